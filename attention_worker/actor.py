"""The attention worker as its cluster sees it: built from a deployment, started, connected, asked, stopped."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from ctypes import CDLL
from pathlib import Path

import torch

from afd import build
from afd.config import Deployment
from afd.credentials import OPEN, Credentials
from afd.errors import ClusterError, ConfigError
from afd.layers.attention import registry as kernels
from afd.models.halves import AttentionHalf
from afd.pipeline.timeline import Recording
from afd.rpc import attention_pb2 as pb
from afd.transport import registry as transports
from afd.transport.attention_port import AttentionPort
from afd.types import FfnAddress, Role
from attention_worker.block_manager import BlockManager
from attention_worker.engine import Engine
from attention_worker.grammar import Grammars
from attention_worker.kv_cache import KvCache
from attention_worker.scheduler import Scheduler
from attention_worker.service import Service
from attention_worker.tuner import MicrobatchTuner

GIB = 1 << 30


class AttentionWorker:
    """One attention_rank. `epoch` names the run; `workers_on_host` share this host's cores and memory; `credentials`
    are asked of routers, and shown to FFN workers."""

    def __init__(
        self,
        deployment: Deployment,
        attention_rank: int,
        epoch: int,
        workers_on_host: int = 1,
        credentials: Credentials = OPEN,
    ) -> None:
        self.deployment = deployment
        self.attention_rank = attention_rank
        self.epoch = epoch
        self.workers_on_host = workers_on_host
        self.credentials = credentials
        self.threads = build.num_threads(deployment.attention.threads, workers_on_host)
        self._plan: build.Plan | None = None
        self._model: AttentionHalf | None = None
        self._kernels: CDLL | None = None
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._reconnecting = threading.Lock()
        self._address = ""
        transport = deployment.transport
        self._service = Service(self.status_reply, transport.address, credentials, transport.deadline_s)

    def start(self) -> str:
        """Loads the attention half and opens the door to routers; returns its host:port.

        Raises ModelError, ConfigError, TransportError.
        """
        torch.set_num_threads(self.threads)
        self._plan = plan = build.plan(self.deployment)
        self._kernels = build.attention_kernels(plan, self.deployment.attention.block_size)
        self._model = plan.family.attention(plan.spec, plan.weights(Role.ATTENTION), self._kernels)
        self._address = self._service.start()
        return self._address

    def connect(self, ffn: Sequence[FfnAddress], within_s: float | None = None) -> None:
        """Shakes hands with every FFN worker, then starts the engine. Raises TransportError. See afd.cluster.roles."""
        assert self._plan is not None, "connect before start"
        transport = self.deployment.transport
        port = transports.connect(
            transport.kind,
            ffn,
            self._plan.hello(self.epoch, self.attention_rank, 0),
            connect_s=min(transport.connect_s, within_s or transport.connect_s),
            deadline_s=transport.deadline_s,
            spin_us=build.spin_us(transport.spin_us, self.workers_on_host),
            device=self._plan.device,
            credentials=self.credentials,
        )
        try:
            self._engine = self._build_engine(self._plan, port)
        except BaseException:
            port.close()
            raise
        self._thread = threading.Thread(target=self._run, args=(self._engine,), name="attention engine", daemon=True)
        self._thread.start()
        self._service.serve_engine(self._engine)

    def reconnect(self, ffn: Sequence[FfnAddress], within_s: float) -> None:
        """Shakes hands with those of the FFN workers at `ffn` that it has no living link to, and hands the links to
        the engine. Raises TransportError for the first that cannot be reached; those before it are taken."""
        plan, engine, transport = self._plan, self._engine, self.deployment.transport
        assert plan is not None, "reconnect before start"
        assert engine is not None, "reconnect before connect"
        with self._reconnecting:
            for address in ffn:
                if address not in engine.port.living:
                    link = transports.dial(
                        transport.kind,
                        address,
                        plan.hello(self.epoch, self.attention_rank, 0),
                        connect_s=min(transport.connect_s, within_s),
                        deadline_s=transport.deadline_s,
                        device=plan.device,
                        credentials=self.credentials,
                    )
                    engine.adopt(address, link)

    def status(self) -> dict[str, object]:
        """State and totals, for the controller. See afd.cluster.roles."""
        reply = self.status_reply()
        port = self._engine.port if self._engine else None
        return {
            "address": self._address or None,
            "ffn_living": port.living if port else (),
            "ffn_suspects": port.suspects if port else {},
            "state": reply.state,
            "message": reply.problem,
            "pid": os.getpid(),
            "running": reply.running,
            "waiting": reply.waiting,
            "blocks_used": reply.blocks_used,
            "blocks_total": reply.blocks_total,
            "generated_tokens": reply.generated_tokens,
            "totals": self._engine.timeline.totals() if self._engine else None,
        }

    def timeline(self, since_ns: int, max_events: int) -> Recording:
        """See afd.cluster.roles."""
        if self._engine is None:
            raise ClusterError(f"the engine of attention_rank {self.attention_rank} does not run yet")
        return self._engine.timeline.since(since_ns, max_events)

    def status_reply(self) -> pb.StatusReply:
        """The same for routers (proto/afd/rpc/attention.proto)."""
        engine = self._engine
        if engine is None:
            return pb.StatusReply(attention_rank=self.attention_rank, state="starting")
        scheduler, requests = engine.scheduler, engine.requests
        return pb.StatusReply(
            attention_rank=self.attention_rank,
            state=engine.state,
            problem=engine.problem,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_total=scheduler.blocks.num_blocks,
            blocks_used=scheduler.blocks.num_used,
            steps=sum(m.steps for m in engine.microbatches),
            generated_tokens=requests.generated_tokens,
            prompt_tokens=requests.prompt_tokens,
            preemptions=scheduler.preemptions,
            max_context=requests.max_context,
            microbatches=scheduler.microbatches,
            waiting_tokens=sum(s.num_pending for s in list(scheduler.waiting)),
            prefix_queries=scheduler.prefixes.queries,
            prefix_hits=scheduler.prefixes.hits,
            running_tokens=sum(len(s.token_ids) for s in list(scheduler.running)),
            free_tokens=scheduler.blocks.num_free * scheduler.blocks.block_size,
        )

    def stop(self, drain_s: float = 0.0) -> None:
        """Lets requests finish for `drain_s` seconds, tells the others, and ends. Idempotent."""
        if self._engine and self._thread:
            if drain_s:
                self._engine.drain(drain_s)
            self._engine.stop()
            self._thread.join(timeout=5.0)
            if self._thread.is_alive():
                raise ClusterError(f"the engine of attention_rank {self.attention_rank} did not end within 5 s")
            self._engine.port.close()
        self._service.stop()

    def _run(self, engine: Engine) -> None:
        torch.set_num_threads(self.threads)  # a setting of each thread
        build.pin(self.deployment, Role.ATTENTION, self.attention_rank, self.workers_on_host)
        engine.run()

    def _build_engine(self, plan: build.Plan, port: AttentionPort) -> Engine:
        assert self._model is not None, "connect before start"
        settings, spec = self.deployment.attention, plan.spec
        num_blocks = self._num_blocks(plan)
        max_context = min(spec.max_context, num_blocks * settings.block_size)
        if settings.max_context != "auto":
            if settings.max_context > max_context:
                raise ConfigError(
                    f"attention.max_context is {settings.max_context} tokens, but the model takes {spec.max_context} "
                    f"and the KV cache holds {num_blocks * settings.block_size} (attention.kv_cache_gib)"
                )
            max_context = settings.max_context
        kernel = kernels.kernel("native" if self._kernels else "batched")
        cache = KvCache(spec, num_blocks, settings.block_size, plan.torch_dtype, plan.device, kernel)
        tuner = MicrobatchTuner(settings.most_microbatches) if settings.microbatches == "auto" else None
        scheduler = Scheduler(
            BlockManager(num_blocks, settings.block_size),
            microbatches=tuner.choice if tuner else settings.most_microbatches,
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            target_s=None if settings.tpot_target_ms is None else settings.tpot_target_ms / 1e3,
            prefix_cache=settings.prefix_cache,
        )
        return Engine(
            self._model,
            cache,
            scheduler,
            port,
            self._service.publish,
            max_context=max_context,
            max_waiting=settings.max_waiting,
            tuner=tuner,
            attention_rank=self.attention_rank,
            recover_s=self.deployment.cluster.recover_s,
            grammars=Grammars(plan.files.tokenizer_json, spec.vocab, spec.eos_token_ids),
        )

    def _num_blocks(self, plan: build.Plan) -> int:
        """How many blocks fit attention.kv_cache_gib; auto: 2 GiB, or a quarter of the free memory where that is
        less, shared with this host's other workers (on a GPU four fifths of what is free once the weights are there);
        never more than the longest context for every running request."""
        settings = self.deployment.attention
        block_bytes = plan.spec.kv_bytes_per_token(plan.dtype) * settings.block_size
        if settings.kv_cache_gib != "auto":
            budget = int(settings.kv_cache_gib * GIB)
        elif plan.device.type == "cuda":
            budget = torch.cuda.mem_get_info(plan.device)[0] * 4 // 5
        else:
            budget = min(2 * GIB, _available_bytes() // 4 // self.workers_on_host)
        most = settings.max_running * -(-plan.spec.max_context // settings.block_size)
        blocks = min(budget // block_bytes, most)
        if blocks < 1:
            raise ConfigError(
                f"a KV block takes {block_bytes} bytes, the KV cache has {budget}; raise attention.kv_cache_gib"
            )
        return blocks


def _available_bytes() -> int:
    """Memory that can be taken without swapping: Linux's own estimate where there is one, else what is unused."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
