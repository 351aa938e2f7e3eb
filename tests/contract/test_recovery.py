"""An FFN worker is lost: what it had not answered is sent again, to another of its rank or to the one that comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from afd.errors import PeerLost, PeerTimeout
from afd.transport.attention_port import AttentionPort
from afd.transport.frame import Frame, FrameKind
from afd.transport.ports import FfnPort
from afd.transport.registry import dial
from afd.types import DType, FfnAddress
from tests.contract.pairs import (
    HELLO,
    KINDS,
    SOON_S,
    FfnThread,
    attention,
    collect,
    double,
    ffn_worker,
    routing,
    tokens,
)

pytestmark = pytest.mark.parametrize("kind", KINDS)

TWO = replace(HELLO, ep=2)


class Keeper:
    """Answers nothing, and keeps what it was asked (copies: a frame's tensors are views)."""

    def __init__(self, wanted: int) -> None:
        self.frames: list[Frame] = []
        self.full = threading.Event()
        self._wanted = wanted

    def __call__(self, port: FfnPort, frame: Frame) -> None:
        self.frames.append(copy(frame))
        if len(self.frames) == self._wanted:
            self.full.set()


def copy(frame: Frame) -> Frame:
    parts = ("hidden", "scales", "expert_ids", "expert_weights")
    return replace(frame, **{p: getattr(frame, p).clone() for p in parts if getattr(frame, p) is not None})


def noting(seen: list[Frame]) -> Callable[[FfnPort, Frame], None]:
    """An FFN that doubles, and keeps copies of what it was asked."""

    def answer(port: FfnPort, frame: Frame) -> None:
        seen.append(copy(frame))
        port.combine(frame, frame.hidden.float() * 2 if frame.hidden is not None else None)

    return answer


def bring(kind: str, port: AttentionPort, ffn: FfnThread, hello: object = HELLO, replica: int = 0) -> FfnAddress:
    """Lets `ffn` take its rank's place."""
    address = replace(ffn.port.address, replica=replica)
    port.adopt(address, dial(kind, address, hello, connect_s=SOON_S, deadline_s=SOON_S))  # type: ignore[arg-type]
    return address


def end(ffn: FfnThread) -> None:
    ffn.stop()
    ffn.port.close()


def same(one: Frame, other: Frame) -> bool:
    names = ("kind", "epoch", "attention_rank", "ffn_rank", "microbatch", "step", "layer", "num_tokens")
    pairs = [(getattr(one, p), getattr(other, p)) for p in ("hidden", "scales", "expert_ids", "expert_weights")]
    return all(getattr(one, n) == getattr(other, n) for n in names) and all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs
    )


@pytest.mark.parametrize("dispatch_dtype", [DType.FP32, DType.FP8])
def test_what_was_not_answered_is_sent_again_in_the_very_same_bytes(kind: str, dispatch_dtype: DType) -> None:
    hello, asked, again = replace(HELLO, dispatch_dtype=dispatch_dtype), Keeper(2), list[Frame]()
    with ExitStack() as stack:
        first = stack.enter_context(ffn_worker(kind, asked, hello))
        port = stack.enter_context(attention(kind, [first.port.address], hello))
        port.dispatch(0, 3, 1, tokens(4, seed=1), *routing(4))
        port.dispatch(1, 5, 2, tokens(6, seed=2), None, None)
        assert asked.full.wait(SOON_S)
        end(first)
        with pytest.raises(PeerLost, match="ffn_rank 0"):
            port.collect(SOON_S)
        assert port.missing == (0,)
        port.dispatch(2, 0, 0, tokens(2, seed=3), None, None)  # nobody is there to take it
        second = stack.enter_context(ffn_worker(kind, noting(again), hello))
        bring(kind, port, second, hello)
        assert port.missing == ()
        answers = [collect(port) for _ in range(3)]
        assert {(a.microbatch, a.step, a.layer, a.num_tokens) for a in answers} == {
            (0, 3, 1, 4),
            (1, 5, 2, 6),
            (2, 0, 0, 2),
        }
        assert all(same(one, other) for one, other in zip(asked.frames, again, strict=False))
        assert port.collect(0.0) is None, "each was answered once"


def test_the_other_ranks_answers_are_taken_meanwhile_and_nobody_computes_twice(kind: str) -> None:
    asked, others = Keeper(1), list[Frame]()
    with ExitStack() as stack:
        lost = stack.enter_context(ffn_worker(kind, asked, replace(TWO, ffn_rank=0)))
        other = stack.enter_context(ffn_worker(kind, noting(others), replace(TWO, ffn_rank=1)))
        port = stack.enter_context(attention(kind, [lost.port.address, other.port.address], TWO))
        port.dispatch(0, 0, 0, tokens(3), None, None)
        assert collect(port).ffn_rank == 1
        assert asked.full.wait(SOON_S)
        end(lost)
        with pytest.raises(PeerLost):
            port.collect(SOON_S)
        port.dispatch(1, 0, 0, tokens(2), None, None)
        assert (collect(port).microbatch, port.missing) == (1, (0,))
        bring(kind, port, stack.enter_context(ffn_worker(kind, double, replace(TWO, ffn_rank=0))), TWO)
        assert {(a.ffn_rank, a.microbatch) for a in (collect(port), collect(port))} == {(0, 0), (0, 1)}
        assert len(others) == 2


def test_what_was_answered_before_the_loss_is_not_asked_again(kind: str) -> None:
    again = list[Frame]()
    with ExitStack() as stack:
        first = stack.enter_context(ffn_worker(kind))
        port = stack.enter_context(attention(kind, [first.port.address]))
        port.dispatch(0, 0, 0, tokens(3), None, None)
        answer = collect(port)
        end(first)
        with pytest.raises(PeerLost):
            port.collect(SOON_S)
        bring(kind, port, stack.enter_context(ffn_worker(kind, noting(again))))
        assert answer.hidden is not None
        assert torch.equal(answer.hidden, tokens(3) * 2), "an answer outlives the link it came on"
        port.dispatch(0, 0, 1, tokens(3), None, None)
        assert collect(port).layer == 1
        assert [frame.layer for frame in again] == [1]


def test_a_worker_that_is_too_late_is_replaced_and_what_it_says_later_is_not_heard(kind: str) -> None:
    held = list[tuple[FfnPort, Frame]]()
    with ExitStack() as stack:
        slow = stack.enter_context(ffn_worker(kind, lambda port, frame: held.append((port, frame))))
        port = stack.enter_context(attention(kind, [slow.port.address], deadline_s=0.2))
        port.dispatch(0, 0, 0, tokens(3), None, None)
        with pytest.raises(PeerTimeout, match="has not answered"):
            port.collect(SOON_S)
        assert set(port.suspects) == {slow.port.address}
        new = bring(kind, port, stack.enter_context(ffn_worker(kind)))
        answer = collect(port)
        assert answer.hidden is not None
        assert torch.equal(answer.hidden, tokens(3) * 2)
        assert (port.suspects, port.living) == ({}, (new,))
        assert port.collect(0.0) is None


def test_a_second_link_to_the_same_worker_takes_the_firsts_place(kind: str) -> None:
    """As after the network between the two was cut: the worker lives, its link does not."""
    first_link, seen = threading.Event(), list[Frame]()

    def answer(port: FfnPort, frame: Frame) -> None:
        seen.append(frame)
        if first_link.is_set():
            double(port, frame)

    with ExitStack() as stack:
        ffn = stack.enter_context(ffn_worker(kind, answer))
        port = stack.enter_context(attention(kind, [ffn.port.address]))
        port.dispatch(0, 0, 0, tokens(3), None, None)
        while not seen:
            assert port.collect(0.01) is None
        first_link.set()
        bring(kind, port, ffn)
        assert collect(port).num_tokens == 3
        assert port.living == (ffn.port.address,)


def test_frames_go_to_the_replica_that_has_fewer_and_its_loss_costs_a_resend(kind: str) -> None:
    asked, seen = Keeper(2), list[Frame]()
    with ExitStack() as stack:
        frozen = stack.enter_context(ffn_worker(kind, asked))
        other = stack.enter_context(ffn_worker(kind, noting(seen)))
        addresses = [frozen.port.address, replace(other.port.address, replica=1)]
        port = stack.enter_context(attention(kind, addresses))
        port.dispatch(0, 0, 0, tokens(2), None, None)  # to the first
        for step in range(4):  # the first has one in hand: all others go to the second
            port.dispatch(1, step, 0, tokens(2), None, None)
            assert collect(port).step == step
        assert [frame.microbatch for frame in seen] == [1] * 4
        end(frozen)
        with pytest.raises(PeerLost, match="ffn_rank 0"):
            port.collect(SOON_S)
        assert collect(port).microbatch == 0
        assert (port.missing, port.living) == ((), (addresses[1],))
        back = bring(kind, port, stack.enter_context(ffn_worker(kind)))
        for step in range(4):
            port.dispatch(0, step, 1, tokens(2), None, None)
            assert collect(port).layer == 1
        assert len(seen) < 9, "the one that came back has its share"
        assert set(port.living) == {back, addresses[1]}


def test_an_error_frame_is_an_answer_and_not_a_loss(kind: str) -> None:
    with (
        ffn_worker(kind, lambda port, frame: port.fail(frame, "no")) as ffn,
        attention(kind, [ffn.port.address]) as port,
    ):
        port.dispatch(0, 0, 0, tokens(2), None, None)
        assert collect(port).kind is FrameKind.ERROR
        assert port.missing == ()
