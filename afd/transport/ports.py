"""Many links at once, and the check that every frame is whose it says it is.

A port belongs to the one thread that uses it, which is asserted; only `wake` and `close` may be called from another.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.errors import FrameError, PeerTimeout, TransportError
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport.base import Hello, Link, Listener
from afd.transport.checks import Sent, check_answer, check_dispatch, check_limits
from afd.transport.doors import Doors
from afd.transport.float8 import dequantise, quantise
from afd.transport.frame import Frame, FrameKind
from afd.transport.mailbox import again
from afd.transport.waiting import Port
from afd.types import DType, FfnAddress

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Ffn:
    """One FFN worker, as the attention side keeps it."""

    link: Link
    next_sequence: int = 0
    outstanding: dict[int, Sent] = field(default_factory=dict)  # by microbatch
    error: TransportError | None = None  # why it is lost


class AttentionPort(Port):
    """The attention side: one link to every FFN worker. Belongs to the engine's thread.

    A link that broke, timed out or misbehaved is closed and stays lost: every later `collect` that finds no frame says
    so. Frames' tensors are valid until the next dispatch of the same microbatch.
    """

    def __init__(self, links: Sequence[Link], *, spin_us: int, deadline_s: float) -> None:
        super().__init__(spin_us)
        self._ffns = deque(_Ffn(link) for link in links)
        self._num_lost = 0
        self._deadline_s = deadline_s
        self.ffn_ranks = tuple(link.hello.ffn_rank for link in links)
        self._hello = links[0].hello
        for link in links:
            self._watch(link)

    def dispatch(
        self,
        microbatch: int,
        step: int,
        layer: int,
        y: Tensor,
        expert_ids: Tensor | None,
        expert_weights: Tensor | None,
    ) -> None:
        """Sends y [tokens, hidden], in the dispatch dtype, and expert_ids and expert_weights [tokens, top_k] on MoE
        layers, to every FFN worker. The tensors may be reused at once. A worker lost now or before is told by
        `collect`. Raises FrameError when y has more tokens than the handshake agreed on."""
        with self._mine:
            hidden, scales = pack(y, self._hello.dispatch_dtype)
            for ffn in self._ffns:
                if ffn.error is None:
                    hello = ffn.link.hello
                    frame = Frame(
                        FrameKind.DISPATCH, hello.epoch, hello.attention_rank, hello.ffn_rank, microbatch, step, layer,
                        ffn.next_sequence, y.shape[0], hidden, expert_ids, expert_weights, "", scales,
                    )  # fmt: skip
                    self._dispatch(ffn, frame)

    def _dispatch(self, ffn: _Ffn, frame: Frame) -> None:
        assert frame.microbatch not in ffn.outstanding, f"microbatch {frame.microbatch} still waits for {ffn.link.peer}"
        check_limits(frame, ffn.link.hello)
        ffn.next_sequence += 1
        sent = Sent(frame.step, frame.layer, frame.sequence, frame.num_tokens, time.monotonic())
        ffn.outstanding[frame.microbatch] = sent
        try:
            ffn.link.send(frame)
        except TransportError as error:
            self._lose(ffn, error)

    def collect(self, timeout_s: float) -> Frame | None:
        """The next combine or error of any FFN worker (its ffn_rank says whose); None after `timeout_s` seconds or a
        wake. When no frame is here and a worker is lost, raises why, with `peer` naming it: PeerLost, FrameError
        (it sent what it must not), or PeerTimeout (no answer within transport.deadline_s)."""
        with self._mine:
            due_s = self._oldest_s() + self._deadline_s
            left_s = min(timeout_s, due_s - time.monotonic()) if timeout_s else 0.0
            frame = self._wait(left_s, expecting=due_s < math.inf)
            if frame is None and time.monotonic() >= due_s and not self._closed:
                self._lose_the_late()
                return self._next(thoroughly=True)
            return frame

    def _oldest_s(self) -> float:
        """When the oldest dispatch without an answer was sent; infinity when there is none."""
        oldest_s = math.inf
        for ffn in self._ffns:
            for sent in ffn.outstanding.values():
                oldest_s = min(oldest_s, sent.at_s)
        return oldest_s

    def _links(self) -> Iterator[Link]:
        return (ffn.link for ffn in self._ffns if ffn.error is None)

    def _next(self, thoroughly: bool) -> Frame | None:
        for _ in range(len(self._ffns)):
            ffn = self._ffns[0]
            self._ffns.rotate(-1)
            if ffn.error is None:
                try:
                    frame = ffn.link.try_receive() if thoroughly else ffn.link.poll()
                    if frame is not None:
                        check_answer(frame, ffn.link.hello, ffn.outstanding.get(frame.microbatch))
                        del ffn.outstanding[frame.microbatch]
                        return frame
                except TransportError as error:
                    self._lose(ffn, error)
        if self._num_lost:
            self._complain()
        return None

    def _complain(self) -> None:
        """Raises why a worker is lost; each lost one has its turn."""
        lost = next(ffn for ffn in self._ffns if ffn.error is not None)
        assert lost.error is not None, "a lost worker without its error"
        self._ffns.remove(lost)
        self._ffns.append(lost)
        raise again(lost.error)

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
        self._num_lost += 1
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


class FfnPort(Port):
    """The FFN side: a link from every attention worker that is there. Belongs to the FFN loop's thread.

    Nobody's misbehaviour or death ends it: the link is closed and one sentence logged. A frame's tensors are valid
    until its combine or error is sent.
    """

    def __init__(self, listeners: Sequence[Listener], address: FfnAddress, expected: Hello, *, spin_us: int) -> None:
        """`expected`: what this worker serves."""
        super().__init__(spin_us)
        self.address = address
        self._dtype = TORCH_DTYPES[expected.dtype]
        self._attentions: deque[_Attention] = deque()
        self._doors = Doors(listeners, self._alarm.ring)

    @property
    def connected(self) -> frozenset[int]:
        """Attention ranks with a live link."""
        return frozenset(a.link.hello.attention_rank for a in tuple(self._attentions))

    def receive(self, timeout_s: float) -> Frame | None:
        """The next dispatch of any attention worker; None after `timeout_s` seconds or a wake. Takes in new attention
        workers on the way; one that comes again (restarted) replaces its old link."""
        with self._mine:
            return self._wait(timeout_s, expecting=bool(self._attentions))

    def hidden(self, dispatch: Frame, device: torch.device) -> Tensor:
        """y of a dispatch [tokens, hidden], in the model's dtype on `device`: a view of the frame where it has that
        already."""
        assert dispatch.hidden is not None, "a dispatch without a payload passed the port"
        hidden = dispatch.hidden if dispatch.hidden.device == device else dispatch.hidden.to(device)
        if dispatch.scales is None:
            return hidden if hidden.dtype is self._dtype else hidden.to(self._dtype)
        return dequantise(hidden, dispatch.scales.to(device), self._dtype)

    def _links(self) -> Iterator[Link]:
        return (attention.link for attention in self._attentions)

    def _next(self, thoroughly: bool) -> Frame | None:
        while thoroughly and (link := self._doors.take()) is not None:
            self._welcome(link)
        for attention in tuple(self._attentions):
            self._attentions.rotate(-1)
            try:
                frame = attention.link.try_receive() if thoroughly else attention.link.poll()
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
        self._watch(link)
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
        with self._mine:
            attention = next((a for a in self._attentions if a.outstanding.get(dispatch.microbatch) is dispatch), None)
            if attention is None:
                return
            del attention.outstanding[dispatch.microbatch]
            frame = Frame(
                kind, dispatch.epoch, dispatch.attention_rank, dispatch.ffn_rank, dispatch.microbatch, dispatch.step,
                dispatch.layer, dispatch.sequence, dispatch.num_tokens, partial, message=message,
            )  # fmt: skip
            try:
                attention.link.send(frame)
            except TransportError as error:
                self._drop(attention, str(_named(error, attention.link.peer)))

    def _close_all(self) -> None:
        for attention in self._attentions:
            attention.link.close()
        self._doors.close()


def pack(y: Tensor, dtype: DType) -> tuple[Tensor, Tensor | None]:
    """y [tokens, hidden] as a frame carries it in `dtype`, and its scales where that has some."""
    if dtype is DType.FP8:
        return quantise(y)
    wanted = TORCH_DTYPES[dtype]
    return y if y.dtype is wanted else y.to(wanted), None


def _named(error: TransportError, peer: str) -> TransportError:
    """The error with its peer, in the sentence too."""
    text = str(error)
    return type(error)(text if peer in text else f"{peer}: {text}", peer=peer)
