"""The FFN worker as its cluster sees it: built from a deployment, started, asked, stopped. Needs no Ray."""

from __future__ import annotations

import logging
import os
import threading

import torch

from afd import build
from afd.config import Deployment
from afd.errors import ClusterError
from afd.native.halves import kernels_for
from afd.pipeline.timeline import Recording
from afd.transport import registry as transports
from afd.types import FfnAddress, Role
from ffn_worker.loop import FfnLoop

log = logging.getLogger(__name__)


class FfnWorker:
    """One ffn_rank. `epoch` names the run; `workers_on_host` share this host's cores."""

    def __init__(self, deployment: Deployment, ffn_rank: int, epoch: int, workers_on_host: int = 1) -> None:
        self.deployment = deployment
        self.ffn_rank = ffn_rank
        self.epoch = epoch
        self.workers_on_host = workers_on_host
        self.threads = build.num_threads(deployment.ffn.threads, workers_on_host)
        self._loop: FfnLoop | None = None
        self._thread: threading.Thread | None = None
        self._problem = ""

    def start(self) -> FfnAddress:
        """Loads this rank's weights, listens, and starts the loop. Raises ModelError, ConfigError, TransportError."""
        torch.set_num_threads(self.threads)
        plan = build.plan(self.deployment)
        shard = plan.shards[self.ffn_rank]
        kernels = kernels_for(plan.device, plan.torch_dtype, plan.spec.hidden)
        ffn = plan.family.ffn(plan.spec, plan.weights(Role.FFN, shard), shard, kernels)
        transport = self.deployment.transport
        port = transports.listen(
            transport.kind,
            plan.hello(self.epoch, 0, self.ffn_rank),
            bind=transport.address,
            spin_us=build.spin_us(transport.spin_us, self.workers_on_host),
            deadline_s=transport.deadline_s,
            device=plan.device,
        )
        self._loop = FfnLoop(ffn, port, device=plan.device, gather_window_s=self.deployment.ffn.gather_window_us / 1e6)
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name=f"ffn {self.ffn_rank}", daemon=True)
        self._thread.start()
        return port.address

    def status(self) -> dict[str, object]:
        """State and totals, for the controller."""
        counters = self._loop.counters if self._loop else None
        return {
            "state": "lost" if self._problem else "ready" if self._loop else "starting",
            "message": self._problem,
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

    def _run(self, loop: FfnLoop) -> None:
        torch.set_num_threads(self.threads)  # a setting of each thread
        build.pin(self.deployment, Role.FFN, self.ffn_rank, self.workers_on_host)
        try:
            loop.run()
        except Exception as error:
            log.exception("the loop of ffn_rank %d ended", self.ffn_rank)
            self._problem = f"the loop of ffn_rank {self.ffn_rank} ended: {error}"
            loop.port.close()
