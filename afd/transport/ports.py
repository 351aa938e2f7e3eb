"""The FFN side's port: many links at once, and the check that every frame is whose it says it is.

A port belongs to the one thread that uses it, which is asserted; only `wake` and `close` may be called from another.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.errors import FrameError, TransportError
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport.base import Hello, Link, Listener
from afd.transport.checks import check_dispatch
from afd.transport.doors import Doors
from afd.transport.float8 import dequantise
from afd.transport.frame import Frame, FrameKind
from afd.transport.mailbox import named
from afd.transport.waiting import Port
from afd.types import FfnAddress

_log = logging.getLogger(__name__)


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
                self._drop(attention, str(named(error, attention.link.peer)))
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
                self._drop(attention, str(named(error, attention.link.peer)))

    def _close_all(self) -> None:
        for attention in self._attentions:
            attention.link.close()
        self._doors.close()
