"""A worker that dies, hangs, refuses, lies or babbles: it is named in one sentence, soon, and nobody else suffers."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from afd.errors import FrameError, HandshakeRefused, PeerLost, PeerTimeout, TransportError
from afd.transport.attention_port import AttentionPort
from afd.transport.base import Link
from afd.transport.frame import Frame, FrameKind
from afd.transport.mailbox import wait_readable
from afd.transport.ports import FfnPort
from afd.types import DType
from tests.contract.pairs import (
    BETWEEN_PROCESSES,
    HELLO,
    KINDS,
    SOON_S,
    FfnThread,
    attention,
    attention_process,
    collect,
    double,
    ffn_process,
    ffn_worker,
    open_ffn,
    raw_address,
    raw_dial,
    raw_listener,
    routing,
    silence,
    tokens,
)

NOTICED_S = 1.0

pytestmark = pytest.mark.parametrize("kind", KINDS)


def until(condition, timeout_s: float = SOON_S) -> None:  # type: ignore[no-untyped-def]
    """Waits for what another thread or process does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def a_dispatch(**changes: object) -> Frame:
    ids, weights = routing(4)
    frame = Frame(FrameKind.DISPATCH, HELLO.epoch, 0, 0, 1, 0, 2, 0, 4, tokens(4), ids, weights)
    return replace(frame, **changes)  # type: ignore[arg-type]


# --- handshake ---


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("epoch", 8, f"run epoch of the attention side is 8, of this FFN worker {HELLO.epoch}"),
        (
            "model_digest",
            "sha256:4567",
            "model digest of the attention side is sha256:4567, of this FFN worker sha256:0123",
        ),
        ("tp", 2, "TP degree of the attention side is 2, of this FFN worker 1"),
        ("dtype", DType.BF16, "activation dtype of the attention side is BF16, of this FFN worker FP32"),
        ("num_layers", 5, "number of layers of the attention side is 5, of this FFN worker 4"),
        ("hidden_size", 64, "hidden size of the attention side is 64, of this FFN worker 48"),
        ("num_experts", 16, "number of experts of the attention side is 16, of this FFN worker 8"),
        ("top_k", 1, "top_k of the attention side is 1, of this FFN worker 2"),
        ("max_tokens", 33, "wants 33 tokens in a frame, this FFN worker takes 1 to 32 (attention.max_batch_tokens)"),
        ("max_tokens", 0, "wants 0 tokens in a frame, this FFN worker takes 1 to 32 (attention.max_batch_tokens)"),
        ("microbatches", 4, "wants 4 microbatches, this FFN worker takes 1 to 3 (attention.microbatches)"),
    ],
)
def test_a_disagreement_at_connect_is_refused_with_both_values(
    kind: str, field: str, value: object, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    hello = replace(HELLO, **{field: value})  # type: ignore[arg-type]
    with ffn_worker(kind) as ffn:
        addresses = [replace(ffn.port.address, ffn_rank=rank) for rank in range(hello.tp)]
        with pytest.raises(HandshakeRefused) as caught, attention(kind, addresses, hello):
            pass
        assert shown in str(caught.value)
        assert caught.value.peer == "ffn_rank 0"
        assert shown in caplog.text
        assert "refused attention_rank 0" in caplog.text
        assert ffn.port.connected == frozenset()
        with attention(kind, [ffn.port.address]) as port:
            port.dispatch(0, 0, 0, tokens(1), None, None)
            collect(port)


def test_the_wrong_ffn_worker_behind_an_address_is_refused(kind: str) -> None:
    with ffn_worker(kind) as ffn:
        addresses = [ffn.port.address, replace(ffn.port.address, ffn_rank=1)]
        with pytest.raises(HandshakeRefused, match="EP degree of the attention side is 2"):
            attention(kind, addresses, replace(HELLO, ep=2)).__enter__()
    with ffn_worker(kind, expected=replace(HELLO, ep=2)) as ffn:
        addresses = [ffn.port.address, replace(ffn.port.address, ffn_rank=1)]
        with pytest.raises(
            HandshakeRefused, match="ffn_rank of the attention side is 1, of this FFN worker 0"
        ) as caught:
            attention(kind, addresses, replace(HELLO, ep=2)).__enter__()
        assert caught.value.peer == "ffn_rank 1"


def test_smaller_sizes_than_the_limits_are_welcome_and_then_hold(kind: str) -> None:
    small = replace(HELLO, max_tokens=5, microbatches=1)
    with ffn_worker(kind) as ffn, attention(kind, [ffn.port.address], small) as port:
        port.dispatch(0, 0, 0, tokens(5), *routing(5))
        assert collect(port).num_tokens == 5
        with pytest.raises(FrameError, match=r"6 tokens is over the limit of 5 \(attention.max_batch_tokens\)"):
            port.dispatch(0, 1, 0, tokens(6), None, None)
        with pytest.raises(FrameError, match=r"microbatch 1; the limit is 0 \(attention.microbatches\)"):
            port.dispatch(1, 1, 0, tokens(5), None, None)
        port.dispatch(0, 1, 0, tokens(2), None, None)
        assert collect(port).num_tokens == 2


def test_an_ffn_worker_that_is_not_there_is_named_after_the_connect_time(kind: str) -> None:
    port = open_ffn(kind)
    port.close()
    start = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        attention(kind, [port.address], connect_s=0.3).__enter__()
    assert time.monotonic() - start < 0.3 + NOTICED_S
    assert caught.value.peer == "ffn_rank 0"


def test_an_ffn_worker_that_never_shakes_hands_is_named_after_the_connect_time(kind: str) -> None:
    if kind != "shm":
        pytest.skip("the others' bare doors shake hands by themselves")
    listener = raw_listener(kind)  # nobody asks it
    with pytest.raises(PeerTimeout, match=r"within 0.2 s \(transport.connect_s\)") as caught:
        attention(kind, [raw_address(kind, listener)], connect_s=0.2).__enter__()
    assert caught.value.peer == "ffn_rank 0"
    listener.close()


# --- death ---


def test_an_ffn_worker_that_closes_is_lost_by_name_and_its_rank_stays_missing(kind: str) -> None:
    with ExitStack() as stack:
        hello = replace(HELLO, ep=2)
        ffns = [stack.enter_context(ffn_worker(kind, expected=replace(hello, ffn_rank=r))) for r in range(2)]
        port = stack.enter_context(attention(kind, [ffn.port.address for ffn in ffns], hello))
        port.dispatch(0, 0, 0, tokens(2), None, None)
        assert {collect(port).ffn_rank, collect(port).ffn_rank} == {0, 1}
        ffns[1].stop()
        ffns[1].port.close()
        start = time.monotonic()
        with pytest.raises(PeerLost, match="ffn_rank 1") as caught:
            port.collect(SOON_S)
        assert time.monotonic() - start < NOTICED_S
        assert caught.value.peer == "ffn_rank 1"
        assert port.collect(0.05) is None, "a loss is told once"
        # The other one goes on.
        port.dispatch(0, 1, 0, tokens(2), None, None)
        frame = collect(port)
        assert (frame.ffn_rank, frame.step) == (0, 1)
        assert port.missing == (1,)
        assert port.living == (ffns[0].port.address,)


def test_every_lost_ffn_worker_has_its_turn_to_be_told(kind: str) -> None:
    with ExitStack() as stack:
        hello = replace(HELLO, ep=2)
        ffns = [stack.enter_context(ffn_worker(kind, expected=replace(hello, ffn_rank=r))) for r in range(2)]
        port = stack.enter_context(attention(kind, [ffn.port.address for ffn in ffns], hello))
        for ffn in ffns:
            ffn.stop()
            ffn.port.close()
        told = set()

        def collect_one() -> bool:
            with pytest.raises(PeerLost) as caught:
                port.collect(SOON_S)
            told.add(caught.value.peer)
            return told == {"ffn_rank 0", "ffn_rank 1"}

        until(collect_one, NOTICED_S)


def test_what_was_answered_before_the_end_is_still_collected(kind: str) -> None:
    listener = raw_listener(kind)
    with accepting(kind, listener) as (port, link):
        port.dispatch(0, 0, 2, tokens(2), None, None)
        dispatch = next_frame(link)
        link.send(replace(dispatch, kind=FrameKind.COMBINE))
        link.close()
        assert collect(port).kind is FrameKind.COMBINE
        with pytest.raises(PeerLost, match="ffn_rank 0"):
            port.collect(SOON_S)


def test_an_attention_worker_that_closes_is_forgotten_and_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with ffn_worker(kind) as ffn:
        with attention(kind, [ffn.port.address]), attention(kind, [ffn.port.address], replace(HELLO, attention_rank=3)):
            until(lambda: ffn.port.connected == {0, 3})
        until(lambda: not ffn.port.connected, NOTICED_S)
        assert "attention_rank 3 is gone" in caplog.text
        assert "attention_rank 0 is gone" in caplog.text


def test_a_killed_ffn_process_is_noticed_within_a_second(kind: str) -> None:
    if kind not in BETWEEN_PROCESSES:
        pytest.skip("inproc is for one process")
    with ffn_process(kind) as (process, address), attention(kind, [address]) as port:
        port.dispatch(0, 0, 0, tokens(4), None, None)
        collect(port)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(PeerLost, match="ffn_rank 0") as caught:
            port.collect(SOON_S)
        assert time.monotonic() - start < NOTICED_S
        assert caught.value.peer == "ffn_rank 0"
        assert port.missing == (0,)


def test_a_killed_attention_process_is_noticed_and_may_come_again(kind: str) -> None:
    if kind not in BETWEEN_PROCESSES:
        pytest.skip("inproc is for one process")
    with ffn_worker(kind) as ffn, attention(kind, [ffn.port.address], replace(HELLO, attention_rank=1)) as other:
        with attention_process(kind, ffn.port.address) as process:
            assert ffn.port.connected == {0, 1}
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            until(lambda: ffn.port.connected == {1}, NOTICED_S)
        with attention_process(kind, ffn.port.address):
            other.dispatch(0, 0, 0, tokens(2), None, None)
            assert collect(other).num_tokens == 2


def test_an_attention_worker_that_connects_again_replaces_its_old_link(kind: str) -> None:
    held: list[Frame] = []

    def hold_the_first(port: FfnPort, frame: Frame) -> None:
        if not held:
            held.append(frame)
        else:
            port.combine(held[0], tokens(7))  # nobody is there any more to read it
            double(port, frame)

    with ffn_worker(kind, hold_the_first) as ffn, attention(kind, [ffn.port.address]) as old:
        old.dispatch(0, 0, 0, tokens(7), None, None)
        until(lambda: held)
        with attention(kind, [ffn.port.address]) as new:
            with pytest.raises(PeerLost, match="ffn_rank 0"):
                old.collect(SOON_S)
            new.dispatch(0, 0, 0, tokens(2), None, None)
            assert collect(new).num_tokens == 2
            assert ffn.port.connected == {0}


# --- time ---


def test_an_ffn_worker_that_does_not_answer_is_named_after_the_deadline(kind: str) -> None:
    with ffn_worker(kind, silence) as ffn, attention(kind, [ffn.port.address], deadline_s=0.3) as port:
        assert port.collect(0.01) is None
        start = time.monotonic()
        port.dispatch(1, 6, 2, tokens(3), None, None)
        assert port.collect(0.05) is None
        with pytest.raises(PeerTimeout) as caught:
            port.collect(SOON_S)
        assert 0.3 <= time.monotonic() - start < 0.3 + NOTICED_S
        assert str(caught.value) == (
            "ffn_rank 0 has not answered microbatch 1, step 6, layer 2 for 0.3 s (transport.deadline_s)"
        )
        assert caught.value.peer == "ffn_rank 0"
        assert (port.missing, port.suspects) == ((0,), {ffn.port.address: str(caught.value)})


def test_a_wait_ends_at_its_timeout(kind: str) -> None:
    with ffn_worker(kind, silence) as ffn, attention(kind, [ffn.port.address]) as port:
        port.dispatch(0, 0, 0, tokens(1), None, None)
        for timeout_s in (0.0, 0.05):
            start = time.monotonic()
            assert port.collect(timeout_s) is None
            assert timeout_s <= time.monotonic() - start < timeout_s + NOTICED_S


def test_wake_ends_the_wait_that_is_on_or_comes_next(kind: str) -> None:
    with ffn_worker(kind, silence) as ffn, attention(kind, [ffn.port.address]) as port:
        port.wake()
        start = time.monotonic()
        assert port.collect(SOON_S) is None
        waker = threading.Timer(0.05, port.wake)
        waker.start()
        assert port.collect(SOON_S) is None
        waker.join()
        assert time.monotonic() - start < NOTICED_S
        assert port.collect(0.0) is None


def test_close_from_another_thread_ends_the_wait_and_later_calls_say_so(kind: str) -> None:
    with ffn_worker(kind, silence) as ffn, attention(kind, [ffn.port.address]) as port:
        closer = threading.Timer(0.05, port.close)
        closer.start()
        start = time.monotonic()
        assert port.collect(SOON_S) is None
        assert time.monotonic() - start < NOTICED_S
        closer.join()
        with pytest.raises(TransportError, match="the port is closed"):
            port.collect(0.0)
        port.close()


def test_an_ffn_port_that_is_closed_ends_its_loop_with_a_sentence(kind: str) -> None:
    port = open_ffn(kind)
    ffn = FfnThread(port, double)
    until(lambda: port._owner is not None)
    port.close()
    with pytest.raises(TransportError, match="the port is closed"):
        ffn.stop()


def test_a_port_belongs_to_one_thread(kind: str) -> None:
    with ffn_worker(kind) as ffn:
        until(lambda: ffn.port._owner is not None)
        ffn.port.wake()
        with pytest.raises(AssertionError, match="belongs to one thread"):
            until(lambda: ffn.port.receive(0.0))


# --- lies ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": FrameKind.COMBINE, "expert_ids": None, "expert_weights": None}, "a combine frame came where only"),
        ({"epoch": 3}, f"a frame with epoch 3 came on the link of epoch {HELLO.epoch}"),
        ({"attention_rank": 1}, "a frame with attention_rank 1 came on the link of attention_rank 0"),
        ({"ffn_rank": 1}, "a frame with ffn_rank 1 came on the link of ffn_rank 0"),
        ({"layer": 4}, "layer 4; the limit is 3"),
        ({"hidden": tokens(4).bfloat16()}, "hidden of torch.bfloat16 and size 48; the link carries torch.float32"),
        ({"hidden": torch.zeros(4, 47)}, "size 47"),
        ({"expert_ids": torch.zeros(4, 1, dtype=torch.int32), "expert_weights": torch.zeros(4, 1)}, "has top_k 1"),
        ({"expert_ids": torch.full((4, 2), 8, dtype=torch.int32)}, "expert ids 8 to 8; the model has experts 0 to 7"),
        ({"expert_ids": torch.full((4, 2), -1, dtype=torch.int32)}, "expert ids -1 to -1"),
    ],
)
def test_a_dispatch_that_is_not_the_links_cuts_off_its_sender_only(
    kind: str, changes: dict[str, object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ffn_worker(kind) as ffn, attention(kind, [ffn.port.address], replace(HELLO, attention_rank=2)) as good:
        link = raw_dial(kind, ffn.port.address)
        link.send(a_dispatch())
        assert next_frame(link).kind is FrameKind.COMBINE
        link.send(a_dispatch(sequence=1, **changes))
        with pytest.raises(PeerLost):
            next_frame(link)
        link.close()
        assert said in caplog.text
        assert "attention_rank 0" in caplog.text
        good.dispatch(0, 0, 0, tokens(3), None, None)
        assert collect(good).num_tokens == 3
        assert ffn.port.connected == {2}


@pytest.mark.parametrize("again", [{"sequence": 0}, {"sequence": 1, "step": 1}])
def test_a_microbatch_that_is_dispatched_twice_cuts_off_its_sender(
    kind: str, again: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    answer = double if again["sequence"] == 0 else silence
    with ffn_worker(kind, answer) as ffn:
        link = raw_dial(kind, ffn.port.address)
        link.send(a_dispatch())
        if answer is double:
            next_frame(link)
        link.send(a_dispatch(**again))
        with pytest.raises(PeerLost):
            next_frame(link)
        link.close()
    assert "microbatch 1 was dispatched" in caplog.text


def test_more_tokens_than_agreed_never_reach_the_ffn_worker(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    large = HELLO.max_tokens + 1
    ids, weights = routing(large)
    frame = a_dispatch(num_tokens=large, hidden=tokens(large), expert_ids=ids, expert_weights=weights)
    with ffn_worker(kind) as ffn:
        link = raw_dial(kind, ffn.port.address)
        if kind in ("shm", "collective"):  # they have room for what was agreed
            with pytest.raises(FrameError, match=r"does not fit the slot"):
                link.send(frame)
        else:
            link.send(frame)
            with pytest.raises(PeerLost):
                next_frame(link)
        link.close()
        until(lambda: not ffn.port.connected)
        with attention(kind, [ffn.port.address]) as port:
            port.dispatch(0, 0, 0, tokens(3), None, None)
            assert collect(port).num_tokens == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": FrameKind.DISPATCH}, "a dispatch frame came"),
        ({"epoch": 3}, "epoch 3"),
        ({"attention_rank": 1}, "attention_rank 1"),
        ({"ffn_rank": 1}, "ffn_rank 1 came on the link of ffn_rank 0"),
        ({"step": 9}, "waits for step 0 and was answered with step 9"),
        ({"layer": 3}, "waits for layer 2 and was answered with layer 3"),
        ({"sequence": 1}, "waits for sequence 0 and was answered with sequence 1"),
        ({"num_tokens": 2, "hidden": tokens(2)}, "waits for num_tokens 3 and was answered with num_tokens 2"),
        ({"microbatch": 2}, "microbatch 2, step 0, layer 2 was answered but waits for nothing"),
        ({"hidden": tokens(3).bfloat16()}, "torch.bfloat16"),
        ({"hidden": torch.zeros(3, 47)}, "size 47"),
        ({"kind": FrameKind.ERROR, "hidden": None, "step": 9, "message": "x"}, "step 9"),
    ],
)
def test_an_answer_to_something_else_is_an_error_and_never_used(
    kind: str, changes: dict[str, object], said: str
) -> None:
    listener = raw_listener(kind)
    with accepting(kind, listener) as (port, link):
        port.dispatch(1, 0, 2, tokens(3), None, None)
        dispatch = next_frame(link)
        link.send(replace(dispatch, **{"kind": FrameKind.COMBINE, **changes}))  # type: ignore[arg-type]
        with pytest.raises(FrameError) as caught:
            port.collect(SOON_S)
        assert said in str(caught.value)
        assert caught.value.peer == "ffn_rank 0"
        assert (port.missing, port.suspects) == ((0,), {raw_address(kind, listener): str(caught.value)})
        with pytest.raises(PeerLost, match="attention_rank 0"):
            next_frame(link)


def test_an_answer_given_twice_is_an_error(kind: str) -> None:
    listener = raw_listener(kind)
    with accepting(kind, listener) as (port, link):
        port.dispatch(1, 0, 2, tokens(3), None, None)
        combine = replace(next_frame(link), kind=FrameKind.COMBINE)
        link.send(combine)
        link.send(combine)
        assert collect(port).num_tokens == 3
        with pytest.raises(FrameError, match="waits for nothing"):
            port.collect(SOON_S)


class accepting:
    """An attention port, and the bare link at its other end."""

    def __init__(self, kind: str, listener: object) -> None:
        self.kind, self.listener = kind, listener

    def __enter__(self) -> tuple[AttentionPort, Link]:
        links: list[Link] = []

        def accept() -> None:
            while not links and wait_readable(self.listener.fileno(), SOON_S):  # type: ignore[attr-defined]
                if (link := self.listener.try_accept()) is not None:  # type: ignore[attr-defined]
                    links.append(link)

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        self.context = attention(self.kind, [raw_address(self.kind, self.listener)])  # type: ignore[arg-type]
        port = self.context.__enter__()
        acceptor.join(SOON_S)
        self.link = links[0]
        return port, self.link

    def __exit__(self, *exc: object) -> None:
        self.link.close()
        self.context.__exit__(None, None, None)
        self.listener.close()  # type: ignore[attr-defined]


def next_frame(link: Link) -> Frame:
    """The next frame of a bare link, which must come."""
    while (frame := link.try_receive()) is None:
        assert wait_readable(link.fileno(), SOON_S), "nothing came"
    return frame


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
