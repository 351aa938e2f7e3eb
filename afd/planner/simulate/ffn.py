"""A simulated FFN worker: the FFN loop (ffn_worker.loop), its tensors' time in place of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from afd.pipeline.timeline import Activity
from afd.planner.simulate.agenda import Agenda
from afd.planner.simulate.attention import AttentionWorker, Microbatch
from afd.planner.simulate.clock import Clock
from afd.planner.simulate.disturbance import Disturbance
from afd.planner.simulate.policies import Policies
from afd.planner.simulate.recorder import Recorder
from afd.planner.simulate.scenario import Fault
from afd.planner.simulate.wire import Door
from afd.types import Role

_Frame = tuple[Microbatch, int, int]  # a dispatch, the life of the worker that it was sent to, its bytes
_Call = tuple[Sequence[Any], int]  # the batcher's items, and the life of the worker that computes them


class FfnWorker:
    """`load(layer)`: its share of the routed tokens, over an even one."""

    def __init__(
        self,
        rank: int,
        agenda: Agenda,
        clock: Clock,
        policies: Policies,
        gather_window_s: float,
        load: Callable[[int], float],
        disturbance: Disturbance,
        recorder: Recorder,
    ) -> None:
        self.rank = rank
        self.door = Door(clock.ffn_link)
        self.away = False
        self.busy_s = 0.0
        self.calls = 0
        self._agenda = agenda
        self._clock = clock
        self._batcher = policies.batcher(clock.layers, gather_window_s)
        self._item = policies.item
        self._load = load
        self._disturbance = disturbance
        self._recorder = recorder
        self._marks = recorder.worker(Role.FFN, rank)
        self._life = 0  # what belongs to an earlier one is lost
        self._back_s = 0.0
        self._busy = False
        self._inbox: list[tuple[Microbatch, int]] = []
        self._alarm_s = -1.0
        self._took_s: dict[tuple[int, int], float] = {}  # by layer and tokens

    def expect(self, m: Microbatch, there_s: float, num_bytes: int) -> None:
        """A dispatch is on its way and will be there at `there_s`."""
        self._agenda.at(there_s, self._arrived, (m, self._life, num_bytes))

    def fail(self, now_s: float, fault: Fault) -> None:
        """It is gone, with all that it had."""
        self._life += 1
        self.away, self._busy = True, False
        self._back_s = max(self._back_s, now_s + fault.for_s)
        self._inbox.clear()
        self._batcher.keep(frozenset())
        self._rest(now_s, Activity.IDLE)

    def come_back(self, now_s: float, attention: Sequence[AttentionWorker]) -> None:
        """It, or its replacement, is there, and gets what it did not answer once more."""
        if now_s >= self._back_s:
            self.away = False
            for worker in attention:
                worker.send_again(self, now_s)

    def _arrived(self, now_s: float, frame: _Frame) -> None:
        m, life, num_bytes = frame
        if life != self._life:
            return
        if self._busy:
            self._inbox.append((m, num_bytes))
        else:
            self._take(m, num_bytes, now_s)
            self._serve(now_s)

    def _take(self, m: Microbatch, num_bytes: int, now_s: float) -> None:
        self._batcher.add(self._item(m.owner.rank, m.index, m.layer, now_s, m))
        if self._recorder.on:
            self._marks.mark(
                now_s, Activity.RECEIVE, m.index, m.step, m.layer, m.tokens, num_bytes, m.owner.rank
            )  # fmt: skip

    def _serve(self, now_s: float) -> None:
        """What the batcher gives, computed; or a look again when it will give something."""
        items = self._batcher.next(now_s)
        if items:
            self._call(items, now_s)
            return
        patience_s = self._batcher.patience_s(now_s)
        if patience_s is None:
            self._rest(now_s, Activity.IDLE)
            return
        self._rest(now_s, Activity.GATHER)
        if self._alarm_s != now_s + patience_s:
            self._alarm_s = now_s + patience_s
            self._agenda.at(self._alarm_s, self._alarm, self._life)

    def _alarm(self, now_s: float, life: int) -> None:
        if life == self._life and not self._busy:
            self._serve(now_s)

    def _call(self, items: Sequence[Any], now_s: float) -> None:
        """One layer for all `items`, and writing their answers."""
        first: Microbatch = items[0].payload
        tokens = 0
        for item in items:
            tokens += item.payload.tokens
        key = first.layer, tokens
        took_s = self._took_s.get(key)
        if took_s is None:
            took_s = self._took_s[key] = self._clock.ffn_s(first.layer, tokens, self._load(first.layer))
        start_s = now_s + self._clock.message_s * len(items)
        done_s = start_s + took_s * self._disturbance.factor(
            first.index + first.owner.rank * 7, first.step, first.layer
        )  # fmt: skip
        self._busy, self._marks.resting = True, None
        if self._recorder.on:
            self._marks.mark(start_s, Activity.FFN, layer=first.layer, tokens=tokens)
        self._agenda.at(done_s + self._clock.message_s * len(items), self._done, (items, self._life, now_s))

    def _done(self, now_s: float, call: tuple[Sequence[Any], int, float]) -> None:
        items, life, began_s = call
        if life != self._life:
            return
        self._busy = False
        self.busy_s += now_s - began_s
        self.calls += 1
        for item in items:
            m: Microbatch = item.payload
            if self._recorder.on:
                self._marks.mark(
                    now_s, Activity.COMBINE, m.index, m.step, m.layer, m.tokens, 0, m.owner.rank
                )  # fmt: skip
            num_bytes = self._clock.combine_bytes(m.tokens)
            m.owner.answer(m, self.rank, self.door.send(m.owner.door, num_bytes, now_s), num_bytes)
        self._batcher.answered(items, now_s)
        inbox, self._inbox = self._inbox, []
        for m, num_bytes in inbox:
            self._take(m, num_bytes, now_s)
        self._serve(now_s)

    def _rest(self, now_s: float, activity: Activity) -> None:
        self._marks.resting = activity
        if self._recorder.on:
            self._marks.mark(now_s, activity)
