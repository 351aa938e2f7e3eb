"""What the engine promises beyond the right tokens: cancellation, refusals, failures that hang nobody."""

from __future__ import annotations

import threading

import pytest
import torch

from afd.models.halves import Routing
from afd.transport.local import Faults
from afd.types import SamplingParams
from tests.rig import SECONDS, Result, finished, split, tiny, weights_of

SPEC = tiny("step3")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def error_of(result: Result) -> str:
    assert result.ended.wait(SECONDS), "the request did not end"
    assert result.finish is not None
    assert result.finish.finish_reason == "error"
    return result.finish.error


def test_a_cancelled_request_frees_its_blocks_while_others_go_on() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        engine = rig.engines[0]
        other = rig.submit("other", [1, 2, 3], LONG)
        victim = rig.submit("victim", [4, 5, 6], LONG)
        assert victim.started.wait(SECONDS)
        engine.cancel(0, "victim")
        # Alone, `other` needs this many blocks at most; with the victim's there would be more.
        most = -(-(3 + len(other.tokens) + 20) // engine.scheduler.blocks.block_size)
        while engine.scheduler.blocks.num_used > most:
            assert not other.ended.wait(0.005), "the victim's blocks were kept until the other's end"
            most = -(-(3 + len(other.tokens) + 2) // engine.scheduler.blocks.block_size)
        finished(other)
        assert len(other.tokens) == LONG.max_tokens
        assert not victim.ended.is_set()
        rig.check_idle()


def test_when_a_router_connection_ends_all_its_requests_are_cancelled() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        for i in range(6):
            rig.submit(str(i), [1, 2, 3], LONG)
        rig.engines[0].drop_owner(0)
        rig.check_idle()


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([1] * 512, GREEDY, "the prompt has 512 tokens, and the longest context is 512 tokens"),
        ([1, 101], GREEDY, "token id 101 is outside the vocabulary of 101"),
        ([1], SamplingParams(stop_token_ids=(1000,)), "token id 1000 is outside"),
        ([1], SamplingParams(max_tokens=0), "max_tokens is 0"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_a_sentence(
    prompt: list[int], params: SamplingParams, sentence: str
) -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        result = rig.submit("bad", prompt, params)
        assert sentence in error_of(result)
        assert result.finish is not None
        assert result.finish.client_error
        finished(rig.submit("good", [1, 2], GREEDY))


def test_generation_ends_at_the_longest_context() -> None:
    with split(SPEC, weights_of(SPEC), num_blocks=10, block_size=4) as rig:
        result = finished(rig.submit("r", [1] * 30, LONG))
        assert len(result.tokens) == 10
        assert result.finish is not None
        assert result.finish.finish_reason == "length"


def test_end_of_sequence_and_stop_tokens_end_a_request() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        free = finished(rig.submit("free", [3, 1, 4], GREEDY)).token_ids
        stop = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(free[2],))
        result = finished(rig.submit("stopped", [3, 1, 4], stop))
        assert result.token_ids == free[: free.index(free[2]) + 1]
        assert result.finish is not None
        assert (result.finish.finish_reason, result.finish.stop_token_id) == ("stop", free[2])


@pytest.mark.parametrize("transport", ["inproc", "shm", "grpc"])
def test_a_lost_ffn_worker_ends_every_request_with_its_name_and_new_ones_are_refused(transport: str) -> None:
    with split(SPEC, weights_of(SPEC), "1A2F", transport=transport) as rig:
        running = [rig.submit(str(i), [1, 2, 3], LONG) for i in range(5)]
        assert running[0].started.wait(SECONDS)
        rig.kill_ffn(1)
        assert all(result.ended.wait(0.5) for result in running), "told late"
        assert all("ffn_rank 1" in error_of(result) for result in running)
        assert "ffn_rank 1" in error_of(rig.submit("late", [1, 2], GREEDY))
        assert rig.engines[0].scheduler.blocks.num_used == 0


def test_an_ffn_worker_that_is_lost_while_idle_is_noticed() -> None:
    with split(SPEC, weights_of(SPEC), transport="shm") as rig:
        finished(rig.submit("r", [1], GREEDY))
        rig.kill_ffn(0)
        assert "ffn_rank 0" in error_of(rig.submit("late", [1, 2], GREEDY))


def test_an_unanswered_dispatch_ends_with_the_deadline_and_names_the_silent_one() -> None:
    with split(SPEC, weights_of(SPEC), faults=Faults(drop=1.0), deadline_s=0.2) as rig:
        error = error_of(rig.submit("r", [1, 2, 3], GREEDY))
        assert "ffn_rank 0" in error
        assert "transport.deadline_s" in error


def test_a_failing_ffn_step_is_told_to_its_own_request_and_the_service_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with split(SPEC, weights_of(SPEC), "1A2F") as rig:
        ffn = rig.loops[1].ffn
        compute, poisoned = ffn.layer, threading.Event()

        def layer(index: int, y: torch.Tensor, routing: Routing | None) -> torch.Tensor | None:
            if index == 2 and not poisoned.is_set():
                poisoned.set()
                raise MemoryError("no memory left")
            return compute(index, y, routing)

        monkeypatch.setattr(ffn, "layer", layer)
        error = error_of(rig.submit("unlucky", [1, 2, 3], GREEDY))
        assert "ffn_rank 1" in error
        assert "no memory left" in error
        assert finished(rig.submit("lucky", [1, 2, 3], GREEDY)).token_ids
        rig.check_idle()


def test_a_failing_attention_step_is_told_to_its_own_request_and_the_service_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        model = rig.engines[0].microbatches[0].model
        embed, failed = model.embed, threading.Event()

        def broken(token_ids: torch.Tensor) -> torch.Tensor:
            if not failed.is_set():
                failed.set()
                raise RuntimeError("out of luck")
            return embed(token_ids)

        monkeypatch.setattr(model, "embed", broken)
        assert "out of luck" in error_of(rig.submit("unlucky", [1, 2, 3], GREEDY))
        assert finished(rig.submit("lucky", [1, 2, 3], GREEDY)).token_ids
        rig.check_idle()


def test_stopping_tells_the_requests_that_are_still_here() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        result = rig.submit("r", [1, 2, 3], LONG)
        rig.engines[0].stop()
        assert "stopping" in error_of(result)


def test_draining_lets_running_requests_end_and_refuses_new_ones() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        running = rig.submit("r", [1, 2, 3], GREEDY)
        assert rig.engines[0].drain(SECONDS)
        assert len(finished(running).tokens) == 8
        assert "shutting down" in error_of(rig.submit("late", [1], GREEDY))


def test_a_refusal_says_whether_another_worker_may_help() -> None:
    with split(SPEC, weights_of(SPEC)) as rig:
        requests = rig.engines[0].requests
        requests.max_waiting = 0
        full = rig.submit("full", [1, 2], GREEDY)
        assert "attention.max_waiting" in error_of(full)
        requests.max_waiting = 100
        assert rig.engines[0].drain(SECONDS)
        draining = rig.submit("late", [1, 2], GREEDY)
        assert "shutting down" in error_of(draining)
        wrong = rig.submit("wrong", [], GREEDY)
        assert "empty" in error_of(wrong)
        assert [r.finish.refused for r in (full, draining, wrong) if r.finish] == ["full", "unavailable", ""]


def test_a_shared_prefix_is_reported_with_the_first_token_and_survives_a_cancellation() -> None:
    prompt = list(range(40))
    with split(SPEC, weights_of(SPEC)) as rig:
        victim = rig.submit("victim", prompt, LONG)
        assert victim.started.wait(SECONDS)
        rig.engines[0].cancel(0, "victim")
        again = finished(rig.submit("again", prompt, GREEDY))
        other = finished(rig.submit("other", [*prompt[:20], 99], GREEDY))
        assert (victim.cached_tokens, again.cached_tokens, other.cached_tokens) == (0, 36, 20)
        rig.check_idle()


def test_without_a_replacement_requests_end_after_the_limit_with_its_knob() -> None:
    with split(SPEC, weights_of(SPEC), "1A2F", recover_s=0.3) as rig:
        running = rig.submit("r", [1, 2, 3], LONG)
        assert running.started.wait(SECONDS)
        rig.kill_ffn(1)
        late = rig.submit("late", [1, 2], GREEDY)
        assert not late.ended.wait(0.1)
        for result in (running, late):
            error = error_of(result)
            assert "ffn_rank 1" in error
            assert "within 0.3 s (cluster.recover_s)" in error
        assert rig.engines[0].state == "lost"
        assert rig.engines[0].scheduler.blocks.num_used == 0
        rig.restart_ffn(1)  # too late: its link is closed, and nothing breaks
        assert "ffn_rank 1" in error_of(rig.submit("later", [1, 2], GREEDY))


def test_requests_may_be_cancelled_while_a_worker_is_being_replaced() -> None:
    with split(SPEC, weights_of(SPEC), recover_s=SECONDS) as rig:
        victim, other = rig.submit("victim", [4, 5, 6], LONG), rig.submit("other", [1, 2, 3], LONG)
        assert victim.started.wait(SECONDS)
        rig.kill_ffn(0)
        rig.engines[0].cancel(0, "victim")
        rig.restart_ffn(0)
        assert len(finished(other).tokens) == LONG.max_tokens
        assert not victim.ended.is_set()
        rig.check_idle()
