"""Where the workers' last seconds went, and what their tokens cost: ratios of what the totals have grown by."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from afd.pipeline.timeline import WAITING
from afd.types import Role, WorkerTotals, WorkerView

WINDOW_S = 5.0  # a figure is of at least so long, and goes back to a look that may be older where nobody looks often
_CAUSES = tuple(sorted(activity.label for activity in WAITING))

Worker = tuple[Role, str]  # its label


@dataclass(frozen=True, slots=True)
class Sums:
    """What a worker had done at one moment, or between two."""

    busy_s: float = 0.0
    waited_s: tuple[float, ...] = (0.0,) * len(_CAUSES)
    expert_calls: int = 0
    expert_tokens: int = 0
    generated: int = 0

    @property
    def seconds(self) -> float:
        return self.busy_s + sum(self.waited_s)

    def since(self, before: Sums) -> Sums:
        """A worker that was started anew counts from its start."""
        if self.seconds < before.seconds:
            return self
        return Sums(
            self.busy_s - before.busy_s,
            tuple(now - then for now, then in zip(self.waited_s, before.waited_s, strict=True)),
            self.expert_calls - before.expert_calls,
            self.expert_tokens - before.expert_tokens,
            self.generated - before.generated,
        )


class RecentShares(Collector):
    """`views`: the workers as the controller saw them last. Every collection is a look; figures are of the time since
    an earlier one, at the first since the workers began."""

    def __init__(self, usd_per_hour: Mapping[Role, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.views: Sequence[WorkerView] = ()
        self._usd_per_hour = usd_per_hour
        self._clock = clock
        self._looks: deque[tuple[float, dict[Worker, Sums]]] = deque(maxlen=64)

    def collect(self) -> Iterator[Metric]:
        now = {(view.role, view.label): _sums(view.totals, view) for view in self.views if view.totals is not None}
        before = self._look(now)
        grown = {worker: sums.since(before.get(worker, Sums())) for worker, sums in now.items()}
        yield from _shares(grown)
        if self._usd_per_hour:
            yield from self._costs(now, grown)

    def _look(self, now: dict[Worker, Sums]) -> dict[Worker, Sums]:
        """Keeps this look, at most one a WINDOW_S / 5, and gives the latest that is old enough, or else the oldest."""
        at = self._clock()
        while len(self._looks) > 1 and self._looks[1][0] <= at - WINDOW_S:
            self._looks.popleft()
        before = self._looks[0][1] if self._looks else {}
        if not self._looks or at - self._looks[-1][0] >= WINDOW_S / 5:
            self._looks.append((at, now))
        return before

    def _costs(self, now: dict[Worker, Sums], grown: dict[Worker, Sums]) -> Iterator[Metric]:
        spent = CounterMetricFamily("afd_cost_usd", "What the workers have cost since they began.", labels=["role"])
        for role, usd in self._usd_per_hour.items():
            spent.add_metric([role.value], usd / 3600 * sum(s.seconds for (r, _), s in now.items() if r is role))
        yield spent
        tokens = sum(sums.generated for sums in grown.values())
        if tokens <= 0:
            return
        parts = {"attention": 0.0, "ffn": 0.0, "idle": 0.0}
        for (role, _), sums in grown.items():
            usd_per_s = self._usd_per_hour.get(role, 0.0) / 3600
            parts[role.value] += usd_per_s * sums.busy_s
            parts["idle"] += usd_per_s * sum(sums.waited_s)
        text = "USD per million tokens of the last seconds: for busy attention, busy FFN, and workers that waited."
        family = GaugeMetricFamily("afd_cost_usd_per_million_tokens", text, labels=["part"])
        for part, usd in parts.items():
            family.add_metric([part], usd / tokens * 1e6)
        yield family


def _sums(totals: WorkerTotals, view: WorkerView) -> Sums:
    seconds = {name: total.seconds for name, total in totals.activities.items()}
    return Sums(
        sum(value for name, value in seconds.items() if name not in _CAUSES),
        tuple(seconds.get(cause, 0.0) for cause in _CAUSES),
        totals.expert_calls,
        totals.expert_tokens,
        view.counters.get("generated_tokens", 0),
    )


def _shares(grown: dict[Worker, Sums]) -> Iterator[Metric]:
    busy = GaugeMetricFamily("afd_busy_share", "Of the last seconds, not spent waiting.", labels=["role", "rank"])
    text = "Of the last seconds, spent waiting: idle (no work), wait (for the FFN side), gather (for more work)."
    bubbles = GaugeMetricFamily("afd_bubble_share", text, labels=["role", "rank", "cause"])
    text = "Tokens an expert got in a call, over the last seconds."
    experts = GaugeMetricFamily("afd_tokens_per_expert_call", text, labels=["ffn_rank"])
    for (role, rank), sums in grown.items():
        if sums.seconds > 0:
            busy.add_metric([role.value, rank], sums.busy_s / sums.seconds)
            for cause, waited_s in zip(_CAUSES, sums.waited_s, strict=True):
                bubbles.add_metric([role.value, rank, cause], waited_s / sums.seconds)
        if role is Role.FFN and sums.expert_calls > 0:
            experts.add_metric([rank], sums.expert_tokens / sums.expert_calls)
    yield from (busy, bubbles, experts)
