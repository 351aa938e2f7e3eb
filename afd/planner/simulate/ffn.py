"""A simulated FFN worker: the FFN loop (ffn_worker.loop), its tensors' time in place of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afd.pipeline.timeline import Activity
from afd.planner.simulate.attention import AttentionWorker, Microbatch
from afd.planner.simulate.scenario import Fault
from afd.planner.simulate.wire import Door
from afd.planner.simulate.world import World
from afd.topology import FfnShard
from afd.types import Role

_Frame = tuple[Microbatch, int]  # a dispatch, and the life of the worker that it was sent to
_Call = tuple[Sequence[Any], int, float]  # the batcher's items, the life of who computes them, since when


class FfnWorker:
    """Computes one shard, and keeps nothing: what it was asked for and has not answered can be asked again."""

    def __init__(self, shard: FfnShard, world: World) -> None:
        self.rank = rank = shard.ffn_rank
        self.door = Door(world.clock.latency_s)
        self.away = False
        self.busy_s = 0.0
        self.calls = 0
        layers, scenario = world.clock.layers, world.scenario
        self._agenda = world.agenda
        self._clock = world.clock
        self._batcher = world.policies.batcher(layers, scenario.gather_window_s)
        self._item = world.policies.item
        self._loads = [scenario.load_of(shard, layer) for layer in range(layers)]
        self._disturbance = world.disturbance(Role.FFN, rank)
        self._recorder = world.recorder
        self._marks = world.recorder.worker(Role.FFN, rank)
        self._life = 0  # what belongs to an earlier one is lost
        self._back_s = 0.0
        self._busy = False
        self._inbox: list[Microbatch] = []
        self._alarm_s = -1.0
        self._took_s: dict[tuple[int, int], float] = {}  # by layer and tokens

    def expect(self, m: Microbatch, there_s: float) -> None:
        """A dispatch is on its way and will be there at `there_s`."""
        self._agenda.at(there_s, self._arrived, (m, self._life))

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
        m, life = frame
        if life != self._life:
            return
        if self._busy:
            self._inbox.append(m)
        else:
            self._take(m, now_s)
            self._serve(now_s)

    def _take(self, m: Microbatch, now_s: float) -> None:
        self._batcher.add(self._item(m.owner.rank, m.index, m.layer, now_s, m))
        if self._recorder.on:
            self._mark(Activity.RECEIVE, m, now_s)

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
            took_s = self._took_s[key] = self._clock.ffn_s(first.layer, tokens, self._loads[first.layer])
        factor = self._disturbance.factor(first.index + 64 * first.owner.rank, first.step, first.layer)
        self._busy, self._marks.resting = True, None
        if self._recorder.on:
            self._marks.mark(now_s, Activity.FFN, layer=first.layer, tokens=tokens)
        self._agenda.at(now_s + took_s * factor, self._done, (items, self._life, now_s))

    def _done(self, now_s: float, call: _Call) -> None:
        items, life, began_s = call
        if life != self._life:
            return
        self._busy = False
        self.busy_s += now_s - began_s
        self.calls += 1
        for item in items:
            m: Microbatch = item.payload
            if self._recorder.on:
                self._mark(Activity.COMBINE, m, now_s)
            m.owner.answer(m, self.rank, self.door.send(m.owner.door, m.combine_s[m.layer], now_s))
        self._batcher.answered(items, now_s)
        inbox, self._inbox = self._inbox, []
        for m in inbox:
            self._take(m, now_s)
        self._serve(now_s)

    def _mark(self, activity: Activity, m: Microbatch, now_s: float) -> None:
        self._marks.mark(now_s, activity, m.index, m.step, m.layer, m.tokens, peer=m.owner.rank)

    def _rest(self, now_s: float, activity: Activity) -> None:
        self._marks.resting = activity
        if self._recorder.on:
            self._marks.mark(now_s, activity)
