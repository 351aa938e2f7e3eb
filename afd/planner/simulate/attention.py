"""A simulated attention worker: the engine's loop (attention_worker.engine), its tensors' time in place of tensors.

A turn is the engine's: take the microbatch that the policy chooses, go on with it to its next dispatch, send that. What
a turn does and how long it takes is known when it begins, so it is one event, and so is the moment at which the last of
a dispatch's answers is there.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any

from afd.pipeline.timeline import Activity
from afd.planner.simulate.policies import Step
from afd.planner.simulate.wire import Door
from afd.planner.simulate.world import World
from afd.types import Role

if TYPE_CHECKING:
    from afd.planner.simulate.ffn import FfnWorker


class Microbatch:
    """As attention_worker.microbatch: idle without a batch, paused in the LM head, or sent. `missing`: the FFN ranks
    that have not answered, as bits; `ready_s` when the last answer that is known of is here."""

    __slots__ = (
        "answers", "attention_s", "batch", "combine_s", "dispatch_s", "index", "layer", "missing", "owner", "paused",
        "ready_s", "sent_at", "slices", "step", "tokens",
    )  # fmt: skip

    def __init__(self, owner: AttentionWorker, index: int) -> None:
        self.owner = owner
        self.index = index
        self.batch: Step | None = None
        self.answers: Sized = ()
        self.paused = False
        self.sent_at = self.ready_s = 0.0
        self.missing = 0
        self.step = 0
        self.layer = 0
        self.tokens = 0
        self.attention_s: Sequence[float] = ()  # what each layer takes, with the tokens of this step
        self.dispatch_s: Sequence[float] = ()
        self.combine_s: Sequence[float] = ()
        self.slices = 0  # of the LM head that are left


class AttentionWorker:
    """Sends to the FFN workers that it is connected to."""

    def __init__(self, rank: int, world: World) -> None:
        self.rank = rank
        self.ffns: Sequence[FfnWorker] = ()
        self.door = Door(world.clock.latency_s)
        self.busy_s = 0.0
        self.sent_again = 0
        self.microbatches = [Microbatch(self, index) for index in range(world.scenario.limits.microbatches)]
        self._now_s = 0.0  # of what it is doing: ahead of the agenda within a turn
        self.policy = world.policies.attention(world.scenario.limits, lambda: self._now_s)
        self._agenda = world.agenda
        self._clock = world.clock
        self._slices = world.scenario.head_slices
        self._disturbance = world.disturbance(Role.ATTENTION, rank)
        self._ledger = world.ledger
        self._recorder = world.recorder
        self._marks = world.recorder.worker(Role.ATTENTION, rank)
        self._resting = True
        self._arrivals: list[tuple[float, Microbatch, int, int, int]] = []  # while recording
        self._everybody: Sized = ()
        self._all_bits = 0

    def connect(self, ffns: Sequence[FfnWorker]) -> None:
        self.ffns = ffns
        self._everybody = range(len(ffns))
        self._all_bits = (1 << len(ffns)) - 1

    def wake(self, now_s: float, _: Any = None) -> None:
        """Something changed: it looks, unless it is at work, and will look by itself."""
        if self._resting:
            self._turn(now_s)

    def ask(self, now_s: float, request: tuple[int, int, int]) -> None:
        """A request comes: its number, prompt and wanted tokens."""
        self._now_s = now_s
        self.policy.add(*request)
        self.wake(now_s)

    def answer(self, m: Microbatch, ffn_rank: int, there_s: float) -> None:
        """FFN rank `ffn_rank` has sent its answer for `m`, which will be there at `there_s`."""
        m.missing &= ~(1 << ffn_rank)
        if m.ready_s < there_s:
            m.ready_s = there_s
        if self._recorder.on:
            self._arrivals.append((there_s, m, m.step, m.layer, ffn_rank))
        if not m.missing:
            self._agenda.at(m.ready_s, self._answered, m)

    def send_again(self, ffn: FfnWorker, now_s: float) -> None:
        """`ffn` is back, and knows nothing of what it was asked."""
        for m in self.microbatches:
            if m.missing >> ffn.rank & 1:
                self.sent_again += 1
                self._send(m, ffn, now_s)

    def _answered(self, now_s: float, m: Microbatch) -> None:
        m.answers = self._everybody
        if self._resting:
            self._turn(now_s)

    def _turn(self, now_s: float) -> None:
        if self._arrivals:
            self._collect(now_s)
        while (m := self.policy.choose(self.microbatches, len(self.ffns))) is not None:
            end_s = self._advance(m, now_s)
            if end_s is not None:
                self._resting, self._marks.resting = False, None
                self.busy_s += end_s - now_s
                self._agenda.at(end_s, self._over, m)
                return
        self._resting = True
        self._marks.resting = Activity.WAIT if any(m.batch for m in self.microbatches) else Activity.IDLE
        if self._recorder.on:
            self._marks.mark(now_s, self._marks.resting)

    def _over(self, now_s: float, m: Microbatch) -> None:
        """The turn that went on with `m` is over."""
        if m.batch is not None and not m.paused:
            m.sent_at, m.ready_s, m.missing = now_s, 0.0, self._all_bits
            for ffn in self.ffns:
                self._send(m, ffn, now_s)
        self._turn(now_s)

    def _send(self, m: Microbatch, ffn: FfnWorker, now_s: float) -> None:
        if not ffn.away:
            ffn.expect(m, self.door.send(ffn.door, m.dispatch_s[m.layer], now_s))

    def _advance(self, m: Microbatch, now_s: float) -> float | None:
        """Goes on with `m`; when that is over. None: there is nothing to do for it."""
        self._now_s = now_s
        if m.batch is None:
            return self._begin(m, now_s)
        if m.paused:
            return self._head(m, now_s)
        m.answers = ()
        if self._recorder.on:
            self._marks.mark(now_s, Activity.COMBINE, m.index, m.step, m.layer)
        m.layer += 1
        if m.layer < self._clock.layers:
            return self._half(m, now_s)
        m.slices = self._slices
        return self._head(m, now_s)

    def _begin(self, m: Microbatch, now_s: float) -> float | None:
        """The next step, if the scheduler has one for it."""
        if self._recorder.on:
            self._marks.mark(now_s, Activity.SCHEDULE, m.index, m.step)
        m.batch = step = self.policy.schedule(self.microbatches)
        if step is None:
            return None
        m.tokens, m.layer = step.tokens, 0
        m.attention_s = self._clock.attention_s(step)
        m.dispatch_s, m.combine_s = self._clock.dispatch_s(m.tokens), self._clock.combine_s(m.tokens)
        return self._half(m, now_s)

    def _half(self, m: Microbatch, now_s: float) -> float:
        """One attention half."""
        factor = self._disturbance.factor(m.index, m.step, m.layer)
        done_s = now_s + m.attention_s[m.layer] * factor
        if self._recorder.on:
            self._marks.mark(now_s, Activity.ATTENTION, m.index, m.step, m.layer, m.tokens)
            self._marks.mark(done_s, Activity.DISPATCH, m.index, m.step, m.layer, m.tokens)
        return done_s

    def _head(self, m: Microbatch, now_s: float) -> float:
        """A slice of the LM head; after the last one the step's tokens are there, and the next step begins."""
        step = m.batch
        assert step is not None, "a microbatch without a step has an LM head to compute"
        if self._recorder.on:
            self._marks.mark(now_s, Activity.HEAD, m.index, m.step, 0, step.samples)
        factor = self._disturbance.factor(m.index, m.step, self._clock.layers)
        now_s += self._clock.ends_s(step.samples) / self._slices * factor
        m.slices -= 1
        m.paused = m.slices > 0
        if m.paused:
            return now_s
        if self._recorder.on:
            self._marks.mark(now_s, Activity.SAMPLE, m.index, m.step, 0, step.samples)
        self._now_s = now_s
        m.batch = None
        m.step += 1
        self._ledger.took(self.policy.complete(step, now_s), now_s)
        end_s = self._begin(m, now_s)
        return now_s if end_s is None else end_s

    def _collect(self, now_s: float) -> None:
        """Records the answers that are here: each when it came, or when the worker got round to it."""
        here = sorted((a for a in self._arrivals if a[0] <= now_s), key=lambda a: a[0])
        self._arrivals = [a for a in self._arrivals if a[0] > now_s]
        if not self._recorder.on:
            return
        for there_s, m, step, layer, ffn_rank in here:
            at_s = there_s if self._resting else now_s
            self._marks.mark(at_s, Activity.COLLECT, m.index, step, layer, peer=ffn_rank)
            if self._resting:
                self._marks.mark(at_s, Activity.WAIT)
