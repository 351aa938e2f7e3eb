"""The split model, running: real engines and FFN loops in threads of this process, over any transport.

Everything between a request and its tokens is the product's own code; only the processes around it are missing.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from afd import spec as specs
from afd.layers.attention.registry import kernel
from afd.models import registry
from afd.models.reference import WholeModel
from afd.native.library import load
from afd.spec import ModelSpec
from afd.topology import FfnShard, Topology, ffn_shards
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport import registry as transports
from afd.transport.base import Hello, Link
from afd.transport.local import Faults
from afd.types import DType, GenerateOutput, GenerateRequest, Role, SampledToken, SamplingParams
from afd.weights import dummy, ownership
from attention_worker.block_manager import BlockManager
from attention_worker.engine import Engine
from attention_worker.grammar import Grammars
from attention_worker.kv_cache import KvCache
from attention_worker.scheduler import Scheduler
from ffn_worker.loop import FfnLoop

SECONDS = 60.0


@dataclass
class Result:
    """What one request got so far; `started` is set with its first token, `ended` with its last output."""

    tokens: list[SampledToken] = field(default_factory=list)
    cached_tokens: int = 0
    prompt: tuple[SampledToken, ...] = ()
    finish: GenerateOutput | None = None
    started: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass
class Rig:
    """`engines` by attention_rank, `loops` by ffn_rank. Requests are spread over the engines in turn."""

    spec: ModelSpec
    engines: list[Engine]
    loops: list[FfnLoop]
    results: dict[str, Result]
    stops: list[ExitStack]  # by ffn_rank: ends that worker as if its process had gone
    start_ffn: Callable[[int], FfnLoop]  # in the place of one that was killed
    dial: Callable[[int, FfnLoop], Link]  # from an attention_rank

    def kill_ffn(self, ffn_rank: int) -> None:
        self.stops[ffn_rank].close()

    def restart_ffn(self, ffn_rank: int) -> None:
        """A new worker in the place of a killed one, and every engine told."""
        loop = self.loops[ffn_rank] = self.start_ffn(ffn_rank)
        for attention_rank, engine in enumerate(self.engines):
            engine.adopt(loop.port.address, self.dial(attention_rank, loop))

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams,
        attention_rank: int = 0,
        grammar: str = "",
        generated: Sequence[int] | None = None,
    ) -> Result:
        """`generated`: what a lost worker has given of the answer; None: no other had it."""
        result = self.results[name] = Result()
        request = GenerateRequest(name, tuple(prompt), params, grammar=grammar)
        if generated is not None:
            request = replace(request, generated_token_ids=tuple(generated), replay=True)
        self.engines[attention_rank].submit(0, request)
        return result

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """All prompts, over all engines, some of them only once an earlier one is under way; their token ids."""
        rng, results = random.Random(len(self.engines) + len(self.loops)), list[Result]()
        for i, prompt in enumerate(prompts):
            results.append(self.submit(str(i), prompt, params, i % len(self.engines)))
            if rng.random() < 0.4:
                assert rng.choice(results).started.wait(SECONDS), "a request did not start"
        return [finished(result).token_ids for result in results]

    def check_idle(self) -> None:
        """Nothing running, nothing waiting, no block in use. Only after every request has ended."""
        for engine in self.engines:
            assert engine.drain(SECONDS), "the engine did not come to rest"
            engine.scheduler.check()
            assert engine.scheduler.blocks.num_used == 0
            engine.requests.problem = ""


def finished(result: Result) -> Result:
    """Waits for a request's end, which must not be an error."""
    assert result.ended.wait(SECONDS), "the request did not end"
    assert result.finish is not None
    assert not result.finish.error, result.finish.error
    return result


def weights_of(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    return dummy.weights(registry.family(spec.family).tensors(spec), seed)


def cut(spec: ModelSpec, weights: Mapping[str, Tensor], role: Role, shard: FfnShard | None = None) -> dict[str, Tensor]:
    """One role's part of the whole model's weights, as the loader would give it."""
    tensors = registry.family(spec.family).tensors(spec)
    owned = ownership.owned(tensors, role, shard)
    return {t.name: weights[t.name][index].clone() for t, index in owned if t.name in weights}


def whole(spec: ModelSpec, weights: Mapping[str, Tensor]) -> WholeModel:
    """The oracle: the same model in one piece."""
    family, one = registry.family(spec.family), FfnShard(0, 1, 1)
    return WholeModel(
        spec,
        family.attention(spec, cut(spec, weights, Role.ATTENTION)),
        family.ffn(spec, cut(spec, weights, Role.FFN, one), one),
    )


@contextmanager
def split(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    topology: str = "1A1F",
    sharding: str = "ep",
    microbatches: int = 3,
    transport: str = "inproc",
    faults: Faults | None = None,
    *,
    num_blocks: int = 256,
    block_size: int = 4,
    max_batch_tokens: int = 32,
    max_running: int = 64,
    deadline_s: float = 30.0,
    gather_window_s: float = 2e-4,
    compiled: bool = False,
    dtype: DType = DType.FP32,
    dispatch_dtype: DType | None = None,
    prefix_cache: bool = True,
    tokenizer_json: Path | None = None,
    recover_s: float = 0.0,
) -> Iterator[Rig]:
    """The running system; ends with every thread joined. `compiled`: with the compiled kernels. `dispatch_dtype`:
    None is the model's. `tokenizer_json`: for requests with a grammar."""
    weights = {name: tensor.to(TORCH_DTYPES[dtype]) for name, tensor in weights.items()}
    kernels = load() if compiled else None
    counts, family = Topology.parse(topology), registry.family(spec.family)
    shards = ffn_shards(counts.ffn, sharding, spec.num_experts)  # type: ignore[arg-type]
    device = torch.device("cpu")

    def hello(attention_rank: int, ffn_rank: int) -> Hello:
        return Hello(
            epoch=7,
            model_digest=specs.digest(spec),
            attention_rank=attention_rank,
            ffn_rank=ffn_rank,
            ep=shards[0].ep,
            tp=shards[0].tp,
            dtype=dtype,
            dispatch_dtype=dispatch_dtype or dtype,
            num_layers=spec.layers,
            hidden_size=spec.hidden,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            max_tokens=max_batch_tokens,
            microbatches=microbatches,
        )

    results: dict[str, Result] = {}

    def publish(outputs: list[tuple[int, GenerateOutput]]) -> None:
        for _, output in outputs:
            result = results[output.request_id]
            result.tokens.extend(output.tokens)
            result.cached_tokens += output.cached_tokens
            result.prompt += output.prompt
            if output.tokens:
                result.started.set()
            if output.finish_reason:
                result.finish = output
                result.ended.set()

    options = {"spin_us": 20, "deadline_s": deadline_s, **({"faults": faults} if faults else {})}
    with ExitStack() as stack:
        stops = [stack.enter_context(ExitStack()) for _ in shards]

        def start_ffn(ffn_rank: int) -> FfnLoop:
            shard = shards[ffn_rank]
            ffn = family.ffn(spec, cut(spec, weights, Role.FFN, shard), shard, kernels)
            port = transports.listen(transport, hello(0, ffn_rank), bind="127.0.0.1", **options)
            loop = FfnLoop(ffn, port, device=device, gather_window_s=gather_window_s)
            stops[ffn_rank].callback(port.close)
            stops[ffn_rank].enter_context(running(loop))
            return loop

        def dial(attention_rank: int, loop: FfnLoop) -> Link:
            dialling = {name: value for name, value in options.items() if name != "spin_us"}
            return transports.dial(transport, loop.port.address, hello(attention_rank, 0), connect_s=20.0, **dialling)

        loops = [start_ffn(shard.ffn_rank) for shard in shards]
        engines = []
        for attention_rank in range(counts.attention):
            addresses = [loop.port.address for loop in loops]
            port_a = transports.connect(transport, addresses, hello(attention_rank, 0), connect_s=20.0, **options)
            cache = KvCache(
                spec, num_blocks, block_size, TORCH_DTYPES[dtype], device, kernel("native" if kernels else "batched")
            )
            scheduler = Scheduler(
                BlockManager(num_blocks, block_size),
                microbatches=microbatches,
                max_batch_tokens=max_batch_tokens,
                max_running=max_running,
                prefix_cache=prefix_cache,
            )
            engine = Engine(
                family.attention(spec, cut(spec, weights, Role.ATTENTION), kernels),
                cache,
                scheduler,
                port_a,
                publish,
                max_context=min(spec.max_context, num_blocks * block_size),
                max_waiting=10_000,
                attention_rank=attention_rank,
                recover_s=recover_s,
                grammars=Grammars(tokenizer_json, spec.vocab, spec.eos_token_ids) if tokenizer_json else None,
            )
            stack.callback(port_a.close)
            stack.enter_context(running(engine))
            engines.append(engine)
        yield Rig(spec, engines, loops, results, stops, start_ffn, dial)


@contextmanager
def running(part: Engine | FfnLoop) -> Iterator[None]:
    """Runs an engine or a loop in a thread of its own; one that does not end is an error."""

    def run() -> None:
        torch.set_num_threads(1)
        part.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        part.stop()
        thread.join(timeout=10.0)
        assert not thread.is_alive(), f"{type(part).__name__} did not stop"


def tiny(family: str, **changes: object) -> ModelSpec:
    """A small model of one family, as its config.json would give it."""
    configs: dict[str, dict[str, object]] = defaultdict(dict)
    common = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 101, "rms_norm_eps": 1e-5, "eos_token_id": 100}
    configs["step3"] = common | {
        "model_type": "step3_text",
        "num_attention_heads": 4,
        "head_dim": 32,
        "share_q_dim": 48,
        "num_attention_groups": 1,
        "intermediate_size": 96,
        "moe_num_experts": 12,
        "moe_top_k": 3,
        "moe_intermediate_size": 40,
        "share_expert_dim": 24,
        "norm_expert_weight": True,
        "moe_layers_enum": "1,2",
        "rope_theta": 10000.0,
        "max_position_embedding": 512,
    }
    configs["qwen3_moe"] = common | {
        "model_type": "qwen3_moe",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "num_experts": 12,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    }
    configs["llama"] = common | {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return specs.from_config(configs[family] | changes)
