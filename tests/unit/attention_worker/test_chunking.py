"""Chunks shrink until decode steps keep the target, grow while there is room, and never stop a prompt."""

from __future__ import annotations

import pytest

from afd.types import GenerateRequest, SampledToken, SamplingParams
from attention_worker.block_manager import BlockManager
from attention_worker.chunking import SMALLEST, ChunkBudget
from attention_worker.scheduler import Scheduler
from attention_worker.sequence import Sequence


def settle(budget: ChunkBudget, base_s: float, per_token_s: float, steps: int = 60) -> list[float]:
    """Step times of decodes beside an endless prompt, on a machine that takes `base_s` plus so much per token."""
    times = []
    for _ in range(steps):
        tokens = budget.allowed(decoding=True)
        times.append(base_s + tokens * per_token_s)
        budget.observe(times[-1], tokens)
    return times


@pytest.mark.parametrize(("per_token_s", "wanted"), [(0.001, 80), (0.0002, 400)])
def test_chunks_settle_just_below_the_target(per_token_s: float, wanted: int) -> None:
    budget = ChunkBudget(512, target_s=0.100)
    times = settle(budget, 0.020, per_token_s)[20:]
    assert sorted(times)[int(0.9 * len(times))] <= 0.102
    assert 0.7 * wanted < budget.tokens <= wanted * 1.02


def test_a_target_that_cannot_be_kept_leaves_the_smallest_chunk() -> None:
    budget = ChunkBudget(512, target_s=0.010)
    settle(budget, 0.020, 0.001)
    assert budget.tokens == SMALLEST


def test_without_a_target_or_decodes_chunks_are_whole() -> None:
    free = ChunkBudget(512)
    settle(free, 1.0, 1.0)
    assert free.allowed(decoding=True) == 512
    assert ChunkBudget(512, target_s=0.1).allowed(decoding=False) == 512


def test_steps_without_prompts_and_small_prompts_do_not_inflate_the_chunk() -> None:
    budget = ChunkBudget(512, target_s=0.1)
    before = budget.tokens
    for prompt_tokens in (0, 5):
        budget.observe(0.001, prompt_tokens)
    assert budget.tokens == before


def test_the_scheduler_cuts_prompts_while_others_decode() -> None:
    scheduler = Scheduler(BlockManager(200, 16), microbatches=1, max_batch_tokens=512, max_running=8, target_s=0.1)

    def add(name: str, prompt: int) -> Sequence:
        sequence = Sequence(GenerateRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=50)), 0, 4096)
        scheduler.add(sequence)
        return sequence

    def step(took_s: float) -> dict[str, int]:
        batch = scheduler.schedule()
        assert batch is not None
        counts = {chunk.sequence.request.request_id: chunk.count for chunk in batch.chunks}
        for chunk in batch.chunks:
            if chunk.samples:
                chunk.sequence.append(SampledToken(1), ())
        scheduler.complete(batch, batch.began_s + took_s)
        return counts

    add("early", 300)
    assert step(0.3) == {"early": 300}, "nobody decodes: the whole prompt at once"
    add("late", 2000)
    first = step(0.2)
    assert first["early"] == 1
    assert first["late"] == scheduler.chunks.allowed(True) * 2, (
        "half of it the next time: the step took twice the target"
    )
    second = step(0.05)
    assert second["late"] < first["late"]
    assert step(0.05)["late"] > second["late"]
