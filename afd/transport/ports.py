"""Many links at once: waiting (spin, then sleep), waking, and the check that every frame is whose it says it is.

A port belongs to the one thread that uses it, which is asserted; only `wake` and `close` may be called from another.
"""

from __future__ import annotations

import logging
import math
import selectors
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from afd.errors import FrameError, PeerTimeout, TransportError
from afd.transport.base import Link, Listener
from afd.transport.checks import Sent, check_answer, check_dispatch
from afd.transport.frame import Frame, FrameKind
from afd.transport.mailbox import Bell, again
from afd.types import FfnAddress

_log = logging.getLogger(__name__)

_SHORTEST_SLEEP_S = 1e-3


class _Port(ABC):
    """One thread's view of many descriptors."""

    def __init__(self, spin_us: int) -> None:
        self._spin_s = spin_us / 1e6
        self._selector = selectors.DefaultSelector()
        self._bell = Bell()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._closed = False

    def wake(self) -> None:
        """From any thread: the wait that is going on, or the next one, returns None."""
        self._bell.ring()

    def close(self) -> None:
        """From any thread: ends every link. A wait that is going on returns None; later calls raise. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.wake()
        # Past a second the owner must be stuck in a send; closing its links under it is what ends that.
        taken = self._turn.acquire(timeout=1.0)
        self._close_all()
        self._selector.close()
        self._bell.close()
        if taken:
            self._turn.release()

    @abstractmethod
    def _close_all(self) -> None: ...

    def _forget(self, link: Link) -> None:
        if not self._closed:
            self._selector.unregister(link)
        link.close()

    @contextmanager
    def _mine(self) -> Iterator[None]:
        me = threading.get_ident()
        assert self._closed or self._owner in (None, me), "a port belongs to one thread; others may wake and close it"
        with self._turn:
            if self._closed:
                raise TransportError("the port is closed")
            self._owner = me
            yield

    def _wait(self, timeout_s: float, spin: bool, poll: Callable[[], Frame | None]) -> Frame | None:
        """What `poll` gives, once it gives something; None after `timeout_s` seconds or a wake. `poll` is tried without
        sleeping for the spin time first."""
        start = time.monotonic()
        until, spin_until = start + timeout_s, start + (self._spin_s if spin else 0.0)
        while True:
            frame = poll()
            if frame is not None:
                return frame
            if self._bell.ringing:
                self._bell.silence()
                return None
            now = time.monotonic()
            if now >= until:
                return None
            # The kernel's wait rounds up to whole milliseconds; a shorter one is polled away.
            left_s = until - now
            self._selector.select(left_s if now >= spin_until and left_s >= _SHORTEST_SLEEP_S else 0)


@dataclass(slots=True)
class _Ffn:
    """One FFN worker, as the attention side keeps it."""

    link: Link
    next_sequence: int = 0
    outstanding: dict[int, Sent] = field(default_factory=dict)  # by microbatch
    error: TransportError | None = None  # why it is lost


class AttentionPort(_Port):
    """The attention side: one link to every FFN worker. Belongs to the engine's thread.

    A link that broke, timed out or misbehaved is closed and stays lost: every later `collect` that finds no frame says
    so. Frames' tensors are valid until the next dispatch of the same microbatch.
    """

    def __init__(self, links: Sequence[Link], *, spin_us: int, deadline_s: float) -> None:
        super().__init__(spin_us)
        self._ffns = deque(_Ffn(link) for link in links)
        self._deadline_s = deadline_s
        self.ffn_ranks = tuple(link.hello.ffn_rank for link in links)
        for link in links:
            self._selector.register(link, selectors.EVENT_READ)

    def dispatch(
        self,
        microbatch: int,
        step: int,
        layer: int,
        y: Tensor,
        expert_ids: Tensor | None,
        expert_weights: Tensor | None,
    ) -> None:
        """Sends y [tokens, hidden], and expert_ids and expert_weights [tokens, top_k] on MoE layers, to every FFN
        worker. The tensors may be reused at once. A worker lost now or before is told by `collect`. Raises FrameError
        when y has more tokens than the handshake agreed on."""
        with self._mine():
            for ffn in self._ffns:
                if ffn.error is None:
                    self._dispatch(ffn, microbatch, step, layer, y, expert_ids, expert_weights)

    def _dispatch(
        self, ffn: _Ffn, microbatch: int, step: int, layer: int, y: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> None:
        hello = ffn.link.hello
        assert microbatch not in ffn.outstanding, f"microbatch {microbatch} still waits for {ffn.link.peer}"
        frame = Frame(
            FrameKind.DISPATCH, hello.epoch, hello.attention_rank, hello.ffn_rank, microbatch, step, layer,
            ffn.next_sequence, y.shape[0], y, ids, weights,
        )  # fmt: skip
        check_dispatch(frame, hello)
        ffn.next_sequence += 1
        ffn.outstanding[microbatch] = Sent(step, layer, frame.sequence, frame.num_tokens, time.monotonic())
        try:
            ffn.link.send(frame)
        except TransportError as error:
            self._lose(ffn, error)

    def collect(self, timeout_s: float) -> Frame | None:
        """The next combine or error of any FFN worker (its ffn_rank says whose); None after `timeout_s` seconds or a
        wake. When no frame is here and a worker is lost, raises why, with `peer` naming it: PeerLost, FrameError
        (it sent what it must not), or PeerTimeout (no answer within transport.deadline_s)."""
        with self._mine():
            waiting = [sent.at_s for ffn in self._ffns for sent in ffn.outstanding.values()]
            due = min(waiting, default=math.inf) + self._deadline_s
            left_s = max(0.0, min(timeout_s, due - time.monotonic()))
            frame = self._wait(left_s, bool(waiting), self._next_answer)
            if frame is None and time.monotonic() >= due and not self._closed:
                self._lose_the_late()
                return self._next_answer()
            return frame

    def _next_answer(self) -> Frame | None:
        for _ in range(len(self._ffns)):
            ffn = self._ffns[0]
            self._ffns.rotate(-1)
            if ffn.error is None:
                try:
                    frame = ffn.link.try_receive()
                    if frame is not None:
                        check_answer(frame, ffn.link.hello, ffn.outstanding.get(frame.microbatch))
                        del ffn.outstanding[frame.microbatch]
                        return frame
                except TransportError as error:
                    self._lose(ffn, error)
        lost = next((ffn for ffn in self._ffns if ffn.error is not None), None)
        if lost is not None and lost.error is not None:
            self._ffns.remove(lost)
            self._ffns.append(lost)
            raise again(lost.error)
        return None

    def _lose_the_late(self) -> None:
        due_at_s = time.monotonic() - self._deadline_s
        for ffn in self._ffns:
            microbatch, sent = min(ffn.outstanding.items(), key=lambda item: item[1].at_s, default=(0, None))
            if sent is not None and sent.at_s <= due_at_s:
                what = f"microbatch {microbatch}, step {sent.step}, layer {sent.layer}"
                limit = f"{self._deadline_s:.3g} s (transport.deadline_s)"
                self._lose(ffn, PeerTimeout(f"{ffn.link.peer} has not answered {what} for {limit}"))

    def _lose(self, ffn: _Ffn, error: TransportError) -> None:
        ffn.error = _named(error, ffn.link.peer)
        ffn.outstanding.clear()
        self._forget(ffn.link)

    def _close_all(self) -> None:
        for ffn in self._ffns:
            ffn.link.close()


@dataclass(slots=True)
class _Attention:
    """One attention worker, as the FFN side keeps it."""

    link: Link
    outstanding: dict[int, Frame] = field(default_factory=dict)  # by microbatch
    last_sequence: dict[int, int] = field(default_factory=dict)  # by microbatch


class FfnPort(_Port):
    """The FFN side: a link from every attention worker that is there. Belongs to the FFN loop's thread.

    Nobody's misbehaviour or death ends it: the link is closed and one sentence logged. A frame's tensors are valid
    until its combine or error is sent.
    """

    def __init__(self, listeners: Sequence[Listener], address: FfnAddress, *, spin_us: int) -> None:
        super().__init__(spin_us)
        self.address = address
        self._listeners = tuple(listeners)
        self._attentions: deque[_Attention] = deque()
        for listener in listeners:
            self._selector.register(listener, selectors.EVENT_READ)

    @property
    def connected(self) -> frozenset[int]:
        """Attention ranks with a live link."""
        return frozenset(a.link.hello.attention_rank for a in tuple(self._attentions))

    def receive(self, timeout_s: float) -> Frame | None:
        """The next dispatch of any attention worker; None after `timeout_s` seconds or a wake. Takes in new attention
        workers on the way; one that comes again (restarted) replaces its old link."""
        with self._mine():
            return self._wait(timeout_s, bool(self._attentions), self._next_dispatch)

    def _next_dispatch(self) -> Frame | None:
        for listener in self._listeners:
            if (link := listener.try_accept()) is not None:
                self._welcome(link)
        for attention in tuple(self._attentions):
            self._attentions.rotate(-1)
            try:
                frame = attention.link.try_receive()
                if frame is not None:
                    self._check(frame, attention)
                    return frame
            except TransportError as error:
                self._drop(attention, str(_named(error, attention.link.peer)))
        return None

    @staticmethod
    def _check(frame: Frame, attention: _Attention) -> None:
        check_dispatch(frame, attention.link.hello)
        microbatch, last = frame.microbatch, attention.last_sequence.get(frame.microbatch, -1)
        if microbatch in attention.outstanding:
            raise FrameError(f"microbatch {microbatch} was dispatched again before it was answered")
        if frame.sequence <= last:
            raise FrameError(f"microbatch {microbatch} was dispatched with sequence {frame.sequence} after {last}")
        attention.outstanding[microbatch] = frame
        attention.last_sequence[microbatch] = frame.sequence

    def _welcome(self, link: Link) -> None:
        for attention in tuple(self._attentions):
            if attention.link.hello.attention_rank == link.hello.attention_rank:
                self._drop(attention, f"{link.peer} connected again; its old link is closed")
        self._attentions.append(_Attention(link))
        self._selector.register(link, selectors.EVENT_READ)
        _log.info("%s connected", link.peer)

    def _drop(self, attention: _Attention, why: str) -> None:
        _log.warning("%s", why)
        self._attentions.remove(attention)
        self._forget(attention.link)

    def combine(self, dispatch: Frame, partial: Tensor | None) -> None:
        """Answers `dispatch` (a frame that `receive` gave) with this rank's partial sum [tokens, hidden], or with
        nothing to add (None). Nothing happens when its link went away meanwhile."""
        self._answer(dispatch, FrameKind.COMBINE, partial, "")

    def fail(self, dispatch: Frame, message: str) -> None:
        """Answers `dispatch` with an error: one sentence for the attention side. Nothing happens when its link went
        away meanwhile."""
        self._answer(dispatch, FrameKind.ERROR, None, message)

    def _answer(self, dispatch: Frame, kind: FrameKind, partial: Tensor | None, message: str) -> None:
        with self._mine():
            attention = next((a for a in self._attentions if a.outstanding.get(dispatch.microbatch) is dispatch), None)
            if attention is None:
                return
            del attention.outstanding[dispatch.microbatch]
            frame = replace(dispatch, kind=kind, hidden=partial, expert_ids=None, expert_weights=None, message=message)
            try:
                attention.link.send(frame)
            except TransportError as error:
                self._drop(attention, str(_named(error, attention.link.peer)))

    def _close_all(self) -> None:
        for attention in self._attentions:
            attention.link.close()
        for listener in self._listeners:
            listener.close()


def _named(error: TransportError, peer: str) -> TransportError:
    """The error with its peer, in the sentence too."""
    text = str(error)
    return type(error)(text if peer in text else f"{peer}: {text}", peer=peer)
