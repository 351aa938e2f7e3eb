"""What is dispatched arrives, and what is combined comes back: the same for every transport."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from afd.transport.frame import Frame, FrameKind
from afd.transport.ports import FfnPort
from afd.types import DType
from tests.contract.pairs import (
    BETWEEN_PROCESSES,
    HELLO,
    KINDS,
    FfnThread,
    attention,
    collect,
    double,
    ffn_process,
    ffn_worker,
    open_ffn,
    routing,
    tokens,
)

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16])
@pytest.mark.parametrize("with_routing", [False, True])
def test_every_size_arrives_and_comes_back_bit_for_bit(kind: str, dtype: DType, with_routing: bool) -> None:
    seen: list[Frame] = []

    def keep(port: FfnPort, frame: Frame) -> None:
        assert frame.hidden is not None
        tensors = {
            name: None if (t := getattr(frame, name)) is None else t.clone()
            for name in ("hidden", "expert_ids", "expert_weights")
        }
        seen.append(replace(frame, **tensors))
        port.combine(frame, frame.hidden * 2)

    hello = replace(HELLO, dtype=dtype, dispatch_dtype=dtype)
    with ffn_worker(kind, keep, hello) as ffn, attention(kind, [ffn.port.address], hello) as port:
        for step, count in enumerate((1, 0, 7, HELLO.max_tokens, 0, 2)):
            y = tokens(count, dtype, step)
            ids, weights = routing(count, step) if with_routing else (None, None)
            port.dispatch(1, step, 3, y, ids, weights)
            combine = collect(port)
            dispatch = seen[-1]
            assert dispatch.kind is FrameKind.DISPATCH
            for frame in (dispatch, combine):
                identity = (
                    frame.epoch,
                    frame.attention_rank,
                    frame.ffn_rank,
                    frame.microbatch,
                    frame.step,
                    frame.layer,
                )
                assert identity == (HELLO.epoch, 0, 0, 1, step, 3)
                assert (frame.sequence, frame.num_tokens) == (step, count)
            assert dispatch.hidden is not None
            assert torch.equal(dispatch.hidden, y)
            if ids is None or weights is None:
                assert dispatch.expert_ids is None
                assert dispatch.expert_weights is None
            else:
                assert dispatch.expert_ids is not None
                assert dispatch.expert_weights is not None
                assert torch.equal(dispatch.expert_ids, ids)
                assert torch.equal(dispatch.expert_weights, weights)
            assert combine.kind is FrameKind.COMBINE
            assert combine.hidden is not None
            assert combine.hidden.dtype == y.dtype
            assert torch.equal(combine.hidden, y * 2)


def test_tensors_that_are_not_contiguous_arrive_as_they_read(kind: str) -> None:
    wide = torch.randn(12, 2 * HELLO.hidden_size)
    ids = torch.arange(HELLO.top_k * 6, dtype=torch.int32).remainder(HELLO.num_experts).view(HELLO.top_k, 6).t()
    weights = torch.rand(HELLO.top_k, 6).t()
    y = wide[::2, ::2]

    def check(port: FfnPort, frame: Frame) -> None:
        assert frame.hidden is not None
        assert frame.expert_ids is not None
        assert frame.expert_weights is not None
        assert torch.equal(frame.expert_ids, ids)
        assert torch.equal(frame.expert_weights, weights)
        port.combine(frame, (frame.hidden * 2).t().contiguous().t())

    with ffn_worker(kind, check) as ffn, attention(kind, [ffn.port.address]) as port:
        port.dispatch(0, 0, 0, y, ids, weights)
        combine = collect(port)
        assert combine.hidden is not None
        assert torch.equal(combine.hidden, y * 2)


def test_a_rank_that_adds_nothing_answers_with_an_empty_combine(kind: str) -> None:
    def nothing(port: FfnPort, frame: Frame) -> None:
        port.combine(frame, None)

    with ffn_worker(kind, nothing) as ffn, attention(kind, [ffn.port.address]) as port:
        port.dispatch(2, 5, 1, tokens(9), *routing(9))
        combine = collect(port)
    assert (combine.kind, combine.hidden, combine.num_tokens) == (FrameKind.COMBINE, None, 9)


def test_an_error_carries_its_sentence_and_ends_nothing(kind: str) -> None:
    def fail_first(port: FfnPort, frame: Frame) -> None:
        if frame.step == 0:
            port.fail(frame, "layer 1 has no weights für ffn_rank 0" + "!" * 10_000)
        else:
            double(port, frame)

    with ffn_worker(kind, fail_first) as ffn, attention(kind, [ffn.port.address]) as port:
        port.dispatch(0, 0, 1, tokens(3), None, None)
        error = collect(port)
        assert error.kind is FrameKind.ERROR
        assert error.message.startswith("layer 1 has no weights für ffn_rank 0!")
        assert (error.microbatch, error.step, error.layer, error.num_tokens) == (0, 0, 1, 3)
        port.dispatch(0, 1, 1, tokens(3), None, None)
        assert collect(port).kind is FrameKind.COMBINE


def test_microbatches_may_be_answered_in_any_order(kind: str) -> None:
    held: list[Frame] = []

    def backwards(port: FfnPort, frame: Frame) -> None:
        held.append(frame)
        if len(held) == HELLO.microbatches:
            for each in reversed(held):
                double(port, each)
            held.clear()

    with ffn_worker(kind, backwards) as ffn, attention(kind, [ffn.port.address]) as port:
        for step in range(5):
            sent = [tokens(4 + m, seed=10 * step + m) for m in range(HELLO.microbatches)]
            for m, y in enumerate(sent):
                port.dispatch(m, step, 0, y, None, None)
            answers = [collect(port) for _ in sent]
            assert [a.microbatch for a in answers] == [2, 1, 0]
            # All three are looked at only now: an answer stays as it came until its microbatch is dispatched again.
            for a in answers:
                assert a.hidden is not None
                assert torch.equal(a.hidden, sent[a.microbatch] * 2)


def test_a_sender_may_reuse_its_tensors_at_once(kind: str) -> None:
    def reuse(port: FfnPort, frame: Frame) -> None:
        assert frame.hidden is not None
        partial = frame.hidden * 2
        port.combine(frame, partial)
        partial.fill_(float("nan"))

    port = open_ffn(kind)
    ffn = FfnThread(port, reuse)
    with attention(kind, [port.address]) as attention_port:
        y = tokens(8)
        ffn.stop()
        attention_port.dispatch(0, 0, 0, y, None, None)
        original = y.clone()
        y.fill_(float("nan"))
        # Only now does somebody read it. (A port belongs to one thread: this one takes the stopped loop's place.)
        port._owner = None
        ffn = FfnThread(port, reuse)
        combine = collect(attention_port)
        assert combine.hidden is not None
        assert torch.equal(combine.hidden, original * 2)
    ffn.stop()
    port.close()


def test_two_attention_and_two_ffn_workers_sum_their_partials(kind: str) -> None:
    def times(factor: int):  # type: ignore[no-untyped-def]
        return lambda port, frame: port.combine(frame, frame.hidden * factor)

    hello = replace(HELLO, ep=2)
    with ExitStack() as stack:
        ffns = [
            stack.enter_context(ffn_worker(kind, times(10**rank), replace(hello, ffn_rank=rank))) for rank in range(2)
        ]
        addresses = [ffn.port.address for ffn in reversed(ffns)]
        ports = [
            stack.enter_context(attention(kind, addresses, replace(hello, attention_rank=rank))) for rank in range(2)
        ]
        for step in range(20):
            for rank, port in enumerate(ports):
                for m in range(HELLO.microbatches):
                    port.dispatch(m, step, step % 4, tokens(5, seed=100 * step + 10 * rank + m), None, None)
            for rank, port in enumerate(ports):
                sums: dict[int, torch.Tensor] = {}
                for _ in range(2 * HELLO.microbatches):
                    frame = collect(port)
                    assert frame.attention_rank == rank
                    assert frame.hidden is not None
                    sums[frame.microbatch] = sums.get(frame.microbatch, torch.zeros(())) + frame.hidden
                for m, total in sums.items():
                    y = tokens(5, seed=100 * step + 10 * rank + m)
                    torch.testing.assert_close(total, y * 11)
        assert ports[0].ffn_ranks == (0, 1)
        assert ffns[1].port.connected == {0, 1}


def test_workers_in_processes_of_their_own_talk_the_same(kind: str) -> None:
    if kind not in BETWEEN_PROCESSES:
        pytest.skip("inproc is for one process")
    with ffn_process(kind) as (_, address), attention(kind, [address]) as port:
        for step in range(50):
            y = tokens(1 + step % HELLO.max_tokens, seed=step)
            port.dispatch(step % 3, step, step % 4, y, *routing(y.shape[0]))
            combine = collect(port)
            assert combine.hidden is not None
            assert torch.equal(combine.hidden, y * 2)
