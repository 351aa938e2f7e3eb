"""The split model gives the whole model's tokens, however it is cut, sent, batched and disturbed."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from functools import cache

import pytest

from afd.native import library as native
from afd.spec import ModelSpec
from afd.transport.local import Faults
from afd.types import DType, SamplingParams
from attention_worker.scheduler import Batch
from tests.rig import Rig, finished, split, tiny, weights_of, whole

SHAPES = [("1A1F", "ep"), ("2A1F", "ep"), ("1A2F", "ep"), ("1A2F", "tp"), ("2A2F", "ep"), ("1A4F", "hybrid")]
compiled_only = pytest.mark.skipif(native.load() is None, reason="no C++ compiler, or AFD_KERNELS=plain")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@cache
def load(family: str) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Prompts of many lengths (some longer than a step's budget), and what the whole model says to each."""
    rng = random.Random(3)
    spec = tiny(family)
    prompts = [tuple(rng.randrange(spec.vocab) for _ in range(rng.choice([1, 2, 5, 17, 40, 70]))) for _ in range(9)]
    model = whole(spec, weights_of(spec))
    return prompts, [model.generate(list(p), GREEDY.max_tokens) for p in prompts]


@pytest.mark.parametrize("transport", ["inproc", "shm", "grpc", "collective"])
@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize(("topology", "sharding"), SHAPES)
def test_every_topology_transport_and_number_of_microbatches_gives_the_whole_models_tokens(
    topology: str, sharding: str, microbatches: int, transport: str
) -> None:
    spec = tiny("step3")
    prompts, expected = load("step3")
    with split(spec, weights_of(spec), topology, sharding, microbatches, transport) as rig:
        assert rig.generate(prompts, GREEDY) == expected
        rig.check_idle()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(("topology", "sharding"), [("1A1F", "ep"), ("2A2F", "ep"), ("1A4F", "hybrid"), ("1A3F", "tp")])
def test_every_family_gives_the_whole_models_tokens(family: str, topology: str, sharding: str) -> None:
    spec = tiny(family)
    prompts, expected = load(family)
    with split(spec, weights_of(spec), topology, sharding) as rig:
        assert rig.generate(prompts, GREEDY) == expected


@compiled_only
@pytest.mark.parametrize("transport", ["inproc", "shm"])
@pytest.mark.parametrize("family", ["step3", "llama", "qwen3_moe"])
@pytest.mark.parametrize(("topology", "sharding"), [*SHAPES, ("1A3F", "tp")])
def test_compiled_kernels_give_the_plain_whole_models_tokens(
    topology: str, sharding: str, family: str, transport: str
) -> None:
    spec = tiny(family)
    prompts, expected = load(family)
    with split(spec, weights_of(spec), topology, sharding, 3, transport, block_size=16, compiled=True) as rig:
        assert rig.generate(prompts, GREEDY) == expected
        rig.check_idle()


def bf16(
    spec: ModelSpec, topology: str, microbatches: int, transport: str, dispatch_dtype: DType
) -> AbstractContextManager[Rig]:
    dtypes = {"dtype": DType.BF16, "dispatch_dtype": dispatch_dtype}
    return split(
        spec, weights_of(spec), topology, "ep", microbatches, transport, block_size=16, compiled=True, **dtypes
    )


@cache
def alone(family: str, dispatch_dtype: DType) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """As `load`, in bf16: each prompt alone through one worker of each role in this process."""
    spec, (prompts, _) = tiny(family, hidden_size=128), load(family)
    with bf16(spec, "1A1F", 1, "inproc", dispatch_dtype) as rig:
        return prompts, [finished(rig.submit(str(i), p, GREEDY)).token_ids for i, p in enumerate(prompts)]


@compiled_only
@pytest.mark.parametrize("dispatch_dtype", [DType.BF16, DType.FP8])
@pytest.mark.parametrize("transport", ["shm", "grpc", "collective"])
@pytest.mark.parametrize("family", ["step3", "llama"])
def test_in_bf16_a_request_gets_the_tokens_it_gets_alone(family: str, transport: str, dispatch_dtype: DType) -> None:
    """Every row is computed as if it were alone, so not even rounding depends on batch, microbatch and wire."""
    prompts, expected = alone(family, dispatch_dtype)
    spec = tiny(family, hidden_size=128)
    with bf16(spec, "2A1F", 3, transport, dispatch_dtype) as rig:
        assert rig.generate(prompts, GREEDY) == expected
        rig.check_idle()


@pytest.mark.parametrize("ffn", [1, 2, 3, 4])
@pytest.mark.parametrize("attention", [1, 2, 3, 4])
def test_every_number_of_attention_and_ffn_workers_up_to_four_works(attention: int, ffn: int) -> None:
    spec = tiny("step3")
    prompts, expected = load("step3")
    with split(spec, weights_of(spec), f"{attention}A{ffn}F", "ep", 2, "shm") as rig:
        assert rig.generate(prompts, GREEDY) == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("topology", "sharding"), [("1A1F", "ep"), ("2A2F", "ep")])
def test_delayed_and_reordered_frames_change_nothing(topology: str, sharding: str, seed: int) -> None:
    spec = tiny("step3")
    prompts, expected = load("step3")
    faults = Faults(delay_s=0.003, reorder=True, seed=seed)
    with split(spec, weights_of(spec), topology, sharding, 3, "inproc", faults) as rig:
        assert rig.generate(prompts, GREEDY) == expected


def test_random_arrivals_lengths_and_a_cache_too_small_for_all_change_nothing() -> None:
    spec = tiny("step3")
    rng = random.Random(11)
    model = whole(spec, weights_of(spec))
    requests = [
        (tuple(rng.randrange(spec.vocab) for _ in range(rng.randint(1, 40))), rng.randint(1, 30)) for _ in range(30)
    ]
    expected = [model.generate(list(prompt), count) for prompt, count in requests]
    # 24 blocks of 4 tokens hold one or two of these requests: preemption by recompute is the rule here.
    with split(spec, weights_of(spec), "2A1F", "ep", 3, "inproc", num_blocks=24) as rig:
        results = []
        for i, (prompt, count) in enumerate(requests):
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            results.append(rig.submit(str(i), prompt, params, i % 2))
            if rng.random() < 0.3:
                finished(results[rng.randrange(len(results))])
        assert [finished(r).token_ids for r in results] == expected
        assert sum(e.scheduler.preemptions for e in rig.engines) > 0
        rig.check_idle()


def test_a_result_does_not_depend_on_what_else_is_in_the_batch() -> None:
    spec = tiny("step3")
    rng = random.Random(5)
    params = [
        SamplingParams(temperature=0.9, seed=1, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2, max_tokens=20, ignore_eos=True, repetition_penalty=1.2),
        SamplingParams(temperature=1.3, top_k=20, seed=3, max_tokens=20, ignore_eos=True, frequency_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    ]
    prompt = tuple(rng.randrange(spec.vocab) for _ in range(9))
    with split(spec, weights_of(spec), "1A1F") as rig:
        alone = [finished(rig.submit(f"alone {i}", prompt, p)).token_ids for i, p in enumerate(params)]
        crowd = [
            rig.submit(f"crowd {i}", [rng.randrange(spec.vocab) for _ in range(rng.randint(1, 60))], GREEDY)
            for i in range(10)
        ]
        together = [rig.submit(f"together {i}", prompt, p) for i, p in enumerate(params)]
        assert [finished(r).token_ids for r in together] == alone
        for result in crowd:
            finished(result)


def test_the_number_of_microbatches_changes_while_running_and_changes_nothing() -> None:
    """Regression: a microbatch that ended its step began the next one at once, so the number never fell."""
    spec = tiny("step3")
    prompts, expected = load("step3")
    rng = random.Random(5)
    with split(spec, weights_of(spec), "1A1F", "ep", 3, "inproc") as rig:
        engine = rig.engines[0]
        begin, under_way = engine.scheduler.schedule, list[tuple[int, int]]()

        def schedule() -> Batch | None:
            # What is under way beside this one, and how many there may be.
            under_way.append((sum(m.batch is not None for m in engine.microbatches), engine.scheduler.microbatches))
            batch = begin()
            engine.scheduler.microbatches = rng.choice([1, 2, 3])
            return batch

        engine.scheduler.schedule = schedule  # type: ignore[method-assign]
        assert rig.generate(prompts, GREEDY) == expected
        assert all(beside < allowed for beside, allowed in under_way)
        assert {allowed for _, allowed in under_way} == {1, 2, 3}
        rig.check_idle()
