"""What a worker makes of requests that another one had: who is taken, when, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from afd.types import GenerateRequest, SamplingParams
from attention_worker.block_manager import BlockManager
from attention_worker.scheduler import Scheduler
from attention_worker.sequence import Sequence
from tests import tiny as tiny_model
from tests.rig import SECONDS, finished, split, tiny, weights_of

SPEC = tiny("step3")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_a_full_queue_does_not_refuse_a_replay() -> None:
    with split(SPEC, weights_of(SPEC), "2A1F") as rig:
        whole = finished(rig.submit("whole", [1, 2], GREEDY)).token_ids
        rig.engines[1].requests.max_waiting = 0
        fresh = rig.submit("fresh", [1, 2], GREEDY, 1)
        begun = rig.submit("begun", [1, 2], GREEDY, 1, generated=whole[:3])
        unbegun = rig.submit("not begun", [1, 2], GREEDY, 1, generated=[])
        assert fresh.ended.wait(SECONDS)
        assert fresh.finish is not None
        assert fresh.finish.refused == "full"
        assert finished(begun).token_ids == whole[3:]
        assert finished(unbegun).token_ids == whole


def test_a_replay_passes_those_that_wait_unless_they_are_more_urgent() -> None:
    scheduler = Scheduler(BlockManager(4, 16), microbatches=1, max_batch_tokens=64, max_running=1)

    def add(name: str, priority: int = 0, *, replay: bool = False) -> None:
        request = GenerateRequest(name, (1, 2), SamplingParams(), priority, replay=replay)
        scheduler.add(Sequence(request, 0, 64))

    add("old")
    add("urgent", -1)
    add("first replay", replay=True)
    add("second replay", replay=True)
    add("replay with time", 1, replay=True)
    names = [sequence.request.request_id for sequence in scheduler.waiting]
    assert names == ["urgent", "first replay", "second replay", "old", "replay with time"]


def test_a_replay_counts_what_it_has_as_generated_and_says_it_does_not_wait_anew() -> None:
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=9), generated_token_ids=(4, 5), replay=True)
    sequence = Sequence(request, 0, 64)
    assert (sequence.token_ids, sequence.num_generated, sequence.num_pending) == ([1, 2, 3, 4, 5], 2, 5)
    assert request.num_tokens == 5


@pytest.mark.parametrize(
    ("generated", "params", "sentence"),
    [
        ([3] * 8, GREEDY, "8 tokens are generated already, and max_tokens is 8"),
        ([3, 101], GREEDY, "token id 101 is outside the vocabulary of 101"),
        ([3] * 511, SamplingParams(max_tokens=600), "1 tokens and the answer 511 so far; the longest context is 512"),
    ],
)
def test_a_replay_that_cannot_be_is_refused(generated: list[int], params: SamplingParams, sentence: str) -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        result = rig.submit("r", [1], params, generated=generated)
        assert result.ended.wait(SECONDS)
        assert result.finish is not None
        assert sentence in result.finish.error
        assert result.finish.client_error


def test_an_answer_that_its_grammar_does_not_take_is_refused(tmp_path: Path) -> None:
    spec = tiny("step3", vocab_size=260, eos_token_id=256)
    wrong = tiny_model.byte_ids(b"xy")
    with split(spec, weights_of(spec), tokenizer_json=tiny_model.write_tokenizer(tmp_path)) as rig:
        result = rig.submit("r", [1], GREEDY, grammar='start: "xx"', generated=wrong)
        assert result.ended.wait(SECONDS)
        assert result.finish is not None
        assert "the answer cannot go on in its grammar" in result.finish.error
