"""The FFN worker as its cluster sees it: built from a deployment, started, asked, stopped. Needs no Ray."""

from __future__ import annotations

import logging
import os
import threading
from ctypes import CDLL

import torch

from afd import build
from afd.config import Deployment
from afd.credentials import OPEN, Credentials
from afd.errors import ClusterError
from afd.native.halves import kernels_for
from afd.pipeline.timeline import Recording
from afd.transport import registry as transports
from afd.types import FfnAddress, Role
from ffn_worker.loop import FfnLoop

log = logging.getLogger(__name__)


class FfnWorker:
    """One ffn_rank, or None: a standby, which `start` tells one. `epoch` names the run; `workers_on_host` share this
    host's cores; `credentials` are asked of attention workers on gRPC."""

    def __init__(
        self,
        deployment: Deployment,
        ffn_rank: int | None,
        epoch: int,
        workers_on_host: int = 1,
        credentials: Credentials = OPEN,
    ) -> None:
        self.deployment = deployment
        self.ffn_rank = ffn_rank
        self.epoch = epoch
        self.workers_on_host = workers_on_host
        self.credentials = credentials
        self.threads = build.num_threads(deployment.ffn.threads, workers_on_host)
        self._loop: FfnLoop | None = None
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._plan: build.Plan | None = None
        self._kernels: CDLL | None = None

    def prepare(self) -> None:
        """Plans, and loads the compiled kernels. Raises ModelError, ConfigError."""
        torch.set_num_threads(self.threads)
        self._plan = plan = build.plan(self.deployment)
        self._kernels = kernels_for(plan.device, plan.torch_dtype, plan.spec.hidden)

    def start(self, ffn_rank: int | None = None) -> FfnAddress:
        """Loads this rank's weights, listens, and starts the loop. Raises ModelError, ConfigError, TransportError."""
        self.ffn_rank = ffn_rank if ffn_rank is not None else self.ffn_rank
        if self.ffn_rank is None:
            raise ClusterError("a standby was started without a rank")
        if self._plan is None:
            self.prepare()
        plan, kernels = self._plan, self._kernels
        assert plan is not None, "prepared without a plan"
        shard = plan.shards[self.ffn_rank]
        ffn = plan.family.ffn(plan.spec, plan.weights(Role.FFN, shard), shard, kernels)
        transport = self.deployment.transport
        port = transports.listen(
            transport.kind,
            plan.hello(self.epoch, 0, self.ffn_rank),
            bind=transport.address,
            spin_us=build.spin_us(transport.spin_us, self.workers_on_host),
            deadline_s=transport.deadline_s,
            device=plan.device,
            credentials=self.credentials,
        )
        self._loop = FfnLoop(ffn, port, device=plan.device, gather_window_s=self.deployment.ffn.gather_window_us / 1e6)
        self._thread = threading.Thread(
            target=self._run, args=(self._loop, self.ffn_rank), name=f"ffn {self.ffn_rank}", daemon=True
        )
        self._thread.start()
        return port.address

    def status(self) -> dict[str, object]:
        """State and totals, for the controller."""
        counters = self._loop.counters if self._loop else None
        return {
            "state": "lost" if self._problem else "ready" if self._loop else "starting",
            "message": self._problem,
            "address": self._loop.port.address if self._loop else None,
            "pid": os.getpid(),
            "calls": counters.calls if counters else 0,
            "dispatches": counters.dispatches if counters else 0,
            "tokens": counters.tokens if counters else 0,
            "failures": counters.failures if counters else 0,
            "totals": self._loop.timeline.totals() if self._loop else None,
        }

    def timeline(self, since_ns: int, max_events: int) -> Recording:
        """See afd.cluster.roles."""
        if self._loop is None:
            raise ClusterError(f"the loop of ffn_rank {self.ffn_rank} does not run yet")
        return self._loop.timeline.since(since_ns, max_events)

    def stop(self) -> None:
        """Ends the loop and the links. Idempotent. Raises ClusterError if the loop does not end."""
        if self._loop and self._thread:
            self._loop.stop()
            self._thread.join(timeout=5.0)
            if self._thread.is_alive():
                raise ClusterError(f"the loop of ffn_rank {self.ffn_rank} did not end within 5 s")
            self._loop.port.close()

    def _run(self, loop: FfnLoop, ffn_rank: int) -> None:
        torch.set_num_threads(self.threads)  # a setting of each thread
        build.pin(self.deployment, Role.FFN, ffn_rank, self.workers_on_host)
        try:
            loop.run()
        except Exception as error:
            log.exception("the loop of ffn_rank %d ended", ffn_rank)
            self._problem = f"the loop of ffn_rank {ffn_rank} ended: {error}"
            loop.port.close()
