"""READ FIRST. The FFN worker's loop: receive what is here, let the batcher choose, compute, answer.

One thread owns the model and the port. Nothing is kept between dispatches but the batcher's sense of rhythm. A
failing dispatch is an error to its sender, never the end of the loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.models.halves import FfnHalf, Routing
from afd.pipeline.timeline import EXPERTS_EVERY, Activity, Timeline
from afd.transport.frame import Frame
from afd.transport.ports import FfnPort
from afd.types import Role
from ffn_worker.batcher import Batcher, Item

log = logging.getLogger(__name__)

# With nothing to do, look up this often; arrivals and `stop` wake the loop at once.
IDLE_S = 1.0


@dataclass
class Counters:
    """Totals since start; written by the loop's thread, read by any."""

    calls: int = 0
    dispatches: int = 0
    tokens: int = 0
    failures: int = 0


class FfnLoop:
    """`gather_window_s` bounds the wait for other attention workers' dispatches of the same layer."""

    def __init__(self, ffn: FfnHalf, port: FfnPort, *, device: torch.device, gather_window_s: float) -> None:
        self.ffn = ffn
        self.port = port
        self.device = device
        self.batcher: Batcher[Frame] = Batcher(ffn.spec.layers, gather_window_s)
        self.counters = Counters()
        self.timeline = Timeline(Role.FFN, ffn.shard.ffn_rank)
        self._expert_calls = 0
        self._connected = port.connected
        self._stopping = False

    def run(self) -> None:
        """Until `stop`. The thread that calls this owns the loop."""
        with torch.inference_mode():
            while not self._stopping:
                self._receive()
                self._serve(self.batcher.next(time.monotonic()))

    def stop(self) -> None:
        """Any thread. Ends `run` after the current call."""
        self._stopping = True
        self.port.wake()

    def _receive(self) -> None:
        """Takes every dispatch that is here; waits for one as long as the batcher has nothing to give."""
        patience = self.batcher.patience_s(time.monotonic())
        self.timeline.mark(Activity.IDLE if patience is None else Activity.GATHER if patience else Activity.OTHER)
        frame = self.port.receive(IDLE_S if patience is None else patience)
        while frame is not None:
            self._mark(Activity.RECEIVE, frame, _wire_bytes(frame))
            item = Item(frame.attention_rank, frame.microbatch, frame.layer, time.monotonic(), frame)
            self.batcher.add(item)
            frame = self.port.receive(0.0)
        if self.port.connected != self._connected:
            self._connected = self.port.connected
            self.batcher.keep(self._connected)

    def _serve(self, items: Sequence[Item[Frame]]) -> None:
        """Computes one layer for all `items` at once, and answers each; one by one when that fails."""
        if not items:
            return
        frames = [item.payload for item in items]
        tokens = sum(frame.num_tokens for frame in frames)
        self.timeline.mark(Activity.FFN, layer=frames[0].layer, tokens=tokens)
        try:
            partials = self._compute(frames)
            self._count_experts(frames)  # before the answers: they end the frames
        except Exception as error:  # bad input, a bug or a full memory: told to the sender, the loop goes on
            if len(items) > 1:
                for item in items:
                    self._serve([item])
                return
            log.exception("layer %d for attention_rank %d failed", frames[0].layer, frames[0].attention_rank)
            self.counters.failures += 1
            self.port.fail(frames[0], f"ffn_rank {frames[0].ffn_rank} failed in layer {frames[0].layer}: {error}")
        else:
            self.timeline.work.observe(tokens)
            self.counters.calls += 1
            self.counters.dispatches += len(frames)
            self.counters.tokens += tokens
            for frame, partial in zip(frames, partials, strict=True):
                self._mark(Activity.COMBINE, frame)
                self.port.combine(frame, partial)
        self.batcher.answered(items, time.monotonic())

    def _mark(self, activity: Activity, frame: Frame, wire_bytes: int = 0) -> None:
        self.timeline.mark(
            activity, frame.microbatch, frame.step, frame.layer, frame.num_tokens, wire_bytes, frame.attention_rank
        )

    def _count_experts(self, frames: Sequence[Frame]) -> None:
        """Looks at every 61st call of experts: counting in each would cost more than the whole timeline."""
        if frames[0].expert_ids is None:
            return
        self._expert_calls += 1
        if self._expert_calls % EXPERTS_EVERY == 1:
            ids = torch.cat([frame.expert_ids.flatten() for frame in frames if frame.expert_ids is not None])
            first, end = self.ffn.shard.bounds(self.ffn.spec.num_experts, "ep")
            tokens = torch.bincount(ids, minlength=end)[first:end]  # [experts of this rank]
            self.timeline.count_experts(int((tokens > 0).sum()), int(tokens.sum()))

    def _compute(self, frames: Sequence[Frame]) -> Sequence[Tensor | None]:
        """One call of the FFN half over the frames' tokens -> one partial sum [tokens, hidden] (or None) a frame."""
        y = self._join([self.port.hidden(frame, self.device) for frame in frames])
        assert y is not None, "there are no dispatches"
        ids = self._join([frame.expert_ids for frame in frames])
        weights = self._join([frame.expert_weights for frame in frames])
        routing = None if ids is None or weights is None else Routing(ids, weights)
        partial = self.ffn.layer(frames[0].layer, y, routing)
        if partial is None:
            return [None] * len(frames)
        return torch.split(partial, [frame.num_tokens for frame in frames])

    def _join(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        here = [part.to(self.device) for part in parts if part is not None]
        assert len(here) in (0, len(parts)), "dispatches of one layer disagree on having experts"
        return None if not here else here[0] if len(here) == 1 else torch.cat(here)


def _wire_bytes(dispatch: Frame) -> int:
    """Bytes of its tensors, as they came."""
    hidden, scales, ids = dispatch.hidden, dispatch.scales, dispatch.expert_ids
    num_bytes = 0 if hidden is None else hidden.nbytes
    if scales is not None:
        num_bytes += scales.nbytes
    return num_bytes if ids is None else num_bytes + 8 * ids.numel()  # int32 ids and float32 weights
