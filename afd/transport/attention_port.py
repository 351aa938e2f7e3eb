"""The attention side's port: links to every FFN worker, and what each microbatch still waits for.

An ffn_rank is served by one worker, or by several identical ones (ffn.replicas). A dispatch goes to the one of them
that has the fewest unanswered, and is kept until every rank has answered it. So the loss of a worker loses nothing:
what it had not answered is sent again, the same bytes, to another worker of its rank at once, or to the one that
`adopt` brings. Answers of the other ranks are taken meanwhile.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from afd.errors import PeerLost, PeerTimeout, TransportError
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport.base import Link
from afd.transport.checks import Sent, check_answer, check_limits
from afd.transport.float8 import quantise
from afd.transport.frame import Frame, FrameKind
from afd.transport.mailbox import named
from afd.transport.waiting import Port
from afd.types import DType, FfnAddress

# Past the deadline, what is on its way has this long to be seen: this process may itself have been frozen meanwhile.
_GRACE_S = 0.1


@dataclass(slots=True, eq=False)
class _Worker:
    """One FFN worker, as the attention side keeps it."""

    address: FfnAddress
    link: Link
    alive: bool = True
    next_sequence: int = 0
    outstanding: dict[int, Sent] = field(default_factory=dict)  # by microbatch


class AttentionPort(Port):
    """The attention side: a link to every FFN worker. Belongs to the engine's thread.

    A link that broke, timed out or misbehaved is closed, and `collect` says so once. `missing` names the ranks that
    nobody serves: their dispatches wait for `adopt`, however long that takes; giving up is the engine's to decide.
    Frames' tensors are valid until the next dispatch of the same microbatch.
    """

    def __init__(self, links: Sequence[tuple[FfnAddress, Link]], *, spin_us: int, deadline_s: float) -> None:
        """`links`, at least one for each ffn_rank, each with the address it was dialled at."""
        super().__init__(spin_us)
        self._deadline_s = deadline_s
        self._hello = links[0][1].hello
        self.ffn_ranks = tuple(sorted({address.ffn_rank for address, _ in links}))
        self._all: deque[_Worker] = deque()
        self._serving: dict[int, list[_Worker]] = {ffn_rank: [] for ffn_rank in self.ffn_ranks}
        self._dispatches: dict[int, Frame] = {}  # the last one of each microbatch, as for no worker in particular
        # By ffn_rank, the microbatches whose dispatch nobody of the rank has now; in order.
        self._unsent: dict[int, dict[int, None]] = {ffn_rank: {} for ffn_rank in self.ffn_ranks}
        self._losses: deque[TransportError] = deque()  # not told yet
        # What other threads may read: addresses of the living workers; and why they were cut off, of those that were
        # too late or sent what they must not, until they are replaced. Never changed, but replaced.
        self.living: tuple[FfnAddress, ...] = ()
        self.suspects: Mapping[FfnAddress, str] = {}
        for address, link in links:
            self._add(_Worker(address, link))

    @property
    def missing(self) -> tuple[int, ...]:
        """The ffn_ranks that nobody serves now."""
        return tuple(ffn_rank for ffn_rank in self.ffn_ranks if not self._serving[ffn_rank])

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
        layers, to every FFN rank. The tensors must not change until all of them have answered. A worker lost now is
        told by `collect`. Raises FrameError when y has more tokens than the handshake agreed on."""
        with self._mine:
            hello = self._hello
            hidden, scales = pack(y, hello.dispatch_dtype)
            dispatch = Frame(
                FrameKind.DISPATCH, hello.epoch, hello.attention_rank, hello.ffn_rank, microbatch, step, layer,
                0, y.shape[0], hidden, expert_ids, expert_weights, "", scales,
            )  # fmt: skip
            check_limits(dispatch, hello)
            self._dispatches[microbatch] = dispatch
            for ffn_rank in self.ffn_ranks:
                unsent = self._unsent[ffn_rank]
                assert microbatch not in unsent, f"microbatch {microbatch} still waits for ffn_rank {ffn_rank}"
                unsent[microbatch] = None
                self._send(ffn_rank)

    def adopt(self, address: FfnAddress, link: Link) -> None:
        """From now on `link`, dialled at `address`, serves its rank, in place of any link to the same replica of it.
        What its rank has not answered and no other worker is computing is sent on it."""
        with self._mine:
            for worker in tuple(self._serving[address.ffn_rank]):
                if worker.address.replica == address.replica:
                    self._remove(worker)
            self._add(_Worker(address, link))
            self._send(address.ffn_rank)

    def collect(self, timeout_s: float) -> Frame | None:
        """The next combine or error of any FFN worker (its ffn_rank says whose); None after `timeout_s` seconds or a
        wake. When no frame is here and a worker was lost, raises why, once, with `peer` naming it: PeerLost,
        FrameError (it sent what it must not), or PeerTimeout (no answer within transport.deadline_s)."""
        with self._mine:
            due_s = self._oldest_s() + self._deadline_s
            left_s = min(timeout_s, due_s - time.monotonic()) if timeout_s else 0.0
            frame = self._wait(left_s, expecting=due_s < math.inf)
            if frame is None and time.monotonic() >= due_s and not self._closed:
                frame = self._wait(_GRACE_S, expecting=True)
                if frame is None and not self._closed:
                    self._lose_the_late()
                    frame = self._next(thoroughly=True)
            return frame

    def _oldest_s(self) -> float:
        """When the oldest dispatch without an answer was sent; infinity when there is none."""
        oldest_s = math.inf
        for worker in self._all:
            for sent in worker.outstanding.values():
                oldest_s = min(oldest_s, sent.at_s)
        return oldest_s

    def _links(self) -> Iterator[Link]:
        return (worker.link for worker in self._all)

    def _next(self, thoroughly: bool) -> Frame | None:
        for worker in tuple(self._all):
            self._all.rotate(-1)
            if not worker.alive:  # lost since this turn began
                continue
            try:
                frame = worker.link.try_receive() if thoroughly else worker.link.poll()
                if frame is not None:
                    check_answer(frame, worker.link.hello, worker.outstanding.get(frame.microbatch))
                    del worker.outstanding[frame.microbatch]
                    return frame
            except TransportError as error:
                self._lose(worker, error)
                self._send(worker.address.ffn_rank)
        if self._losses:
            raise self._losses.popleft()
        return None

    # ---- sending, and sending again -----------------------------------------------------------------------------

    def _send(self, ffn_rank: int) -> None:
        """Sends what this rank has not been sent, each to the worker with the fewest unanswered; as long as there is
        one."""
        unsent, serving = self._unsent[ffn_rank], self._serving[ffn_rank]
        while unsent and serving:
            worker = min(serving, key=lambda w: len(w.outstanding)) if len(serving) > 1 else serving[0]
            microbatch = next(iter(unsent))
            del unsent[microbatch]
            try:
                self._send_to(worker, self._dispatches[microbatch])
            except TransportError as error:
                self._lose(worker, error)
            else:
                if len(serving) > 1:  # of equals, the one that waited longest
                    serving.remove(worker)
                    serving.append(worker)

    @staticmethod
    def _send_to(worker: _Worker, dispatch: Frame) -> None:
        hello = worker.link.hello
        frame = Frame(
            FrameKind.DISPATCH, hello.epoch, hello.attention_rank, hello.ffn_rank, dispatch.microbatch, dispatch.step,
            dispatch.layer, worker.next_sequence, dispatch.num_tokens, dispatch.hidden, dispatch.expert_ids,
            dispatch.expert_weights, "", dispatch.scales,
        )  # fmt: skip
        assert frame.microbatch not in worker.outstanding, (
            f"microbatch {frame.microbatch} still waits for {worker.link.peer}"
        )
        worker.next_sequence += 1
        sent = Sent(frame.step, frame.layer, frame.sequence, frame.num_tokens, time.monotonic())
        worker.outstanding[frame.microbatch] = sent
        worker.link.send(frame)

    # ---- coming and going ---------------------------------------------------------------------------------------

    def _add(self, worker: _Worker) -> None:
        self._all.append(worker)
        self._serving[worker.address.ffn_rank].append(worker)
        self._watch(worker.link)
        self.suspects = {a: why for a, why in self.suspects.items() if not a.same_place(worker.address)}
        self._tell()

    def _lose(self, worker: _Worker, error: TransportError) -> None:
        """Closes its link; what it has not answered is to be sent again (`_send`)."""
        error = named(error, worker.link.peer)
        self._losses.append(error)
        if not isinstance(error, PeerLost):
            self.suspects = {**self.suspects, worker.address: str(error)}
        self._remove(worker)

    def _lose_the_late(self) -> None:
        due_at_s = time.monotonic() - self._deadline_s
        for worker in tuple(self._all):
            microbatch, sent = min(worker.outstanding.items(), key=lambda item: item[1].at_s, default=(0, None))
            if worker.alive and sent is not None and sent.at_s <= due_at_s:
                what = f"microbatch {microbatch}, step {sent.step}, layer {sent.layer}"
                limit = f"{self._deadline_s:.3g} s (transport.deadline_s)"
                self._lose(worker, PeerTimeout(f"{worker.link.peer} has not answered {what} for {limit}"))
                self._send(worker.address.ffn_rank)

    def _remove(self, worker: _Worker) -> None:
        ffn_rank = worker.address.ffn_rank
        worker.alive = False
        self._all.remove(worker)
        self._serving[ffn_rank].remove(worker)
        for microbatch in worker.outstanding:
            self._unsent[ffn_rank][microbatch] = None
        worker.outstanding.clear()
        self._forget(worker.link)
        self._tell()

    def _tell(self) -> None:
        self.living = tuple(worker.address for worker in self._all)

    def _close_all(self) -> None:
        for worker in self._all:
            worker.link.close()


def pack(y: Tensor, dtype: DType) -> tuple[Tensor, Tensor | None]:
    """y [tokens, hidden] as a frame carries it in `dtype`, and its scales where that has some."""
    if dtype is DType.FP8:
        return quantise(y)
    wanted = TORCH_DTYPES[dtype]
    return y if y.dtype is wanted else y.to(wanted), None
