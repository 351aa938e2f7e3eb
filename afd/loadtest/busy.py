"""Where a server's workers spend their time during a run, from the counters in its /metrics.

`afd serve` counts the seconds of each worker's activities (afd_activity_seconds). They are read once a second and taken
in between in proportion, so that any window can be asked for when it is known.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from afd.loadtest.client import Target
from afd.loadtest.prices import Worker
from afd.pipeline.timeline import WAITING

EVERY_S = 1.0
_SILENCE_S = 10.0
_LINE = re.compile(r"^afd_activity_seconds_total\{([^}]*)\} (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_IDLE = frozenset(activity.label for activity in WAITING)

Counters = Mapping[tuple[Worker, str], float]  # seconds, by worker and activity


def read(text: str) -> Counters:
    """The counters in the text of /metrics; empty where the server is not ours."""
    counters = {}
    for labels, value in _LINE.findall(text):
        named = dict(_LABEL.findall(labels))
        counters[Worker(named.get("role", ""), int(named.get("rank", 0))), named.get("activity", "")] = float(value)
    return counters


@dataclass(slots=True)
class Samples:
    """What was read when, in seconds since the run's beginning; ascending."""

    taken: list[tuple[float, Counters]] = field(default_factory=list)

    def shares(self, start_s: float, end_s: float) -> dict[Worker, dict[str, float]]:
        """Each worker's time between the two, by activity, as shares of 1. Empty without two readings."""
        before, after = self._at(start_s), self._at(end_s)
        spent: dict[Worker, dict[str, float]] = {}
        for (worker, activity), seconds in after.items():
            if (more := seconds - before.get((worker, activity), 0.0)) > 0:
                spent.setdefault(worker, {})[activity] = more
        return {w: {a: s / sum(some.values()) for a, s in some.items()} for w, some in sorted(spent.items())}

    def busy(self, start_s: float, end_s: float) -> dict[Worker, float]:
        """Each worker's share of the time that was not waiting."""
        shares = self.shares(start_s, end_s)
        return {w: sum(s for a, s in some.items() if a not in _IDLE) for w, some in shares.items()}

    def _at(self, at_s: float) -> Counters:
        taken = self.taken
        if len(taken) < 2:
            return {}
        after = next((i for i, (when_s, _) in enumerate(taken) if when_s >= at_s), len(taken) - 1)
        after = max(after, 1)
        (first_s, first), (then_s, then) = taken[after - 1], taken[after]
        part = min(1.0, max(0.0, (at_s - first_s) / (then_s - first_s))) if then_s > first_s else 1.0
        return {key: first.get(key, 0.0) + part * (value - first.get(key, 0.0)) for key, value in then.items()}


class Watch:
    """Takes samples of a server until it is stopped. A server that does not answer gives none."""

    def __init__(self, target: Target, start_s: float) -> None:
        """Samples' times count from `start_s` of time.monotonic."""
        self.samples = Samples()
        self._target = target
        self._start_s = start_s
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Ends after `stop`, with a last sample."""
        key = self._target.api_key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(headers=headers, timeout=_SILENCE_S, trust_env=False) as session:
            while True:
                stopping = self._stop.is_set()
                try:
                    answer = await session.get(f"{self._target.url}/metrics")
                except httpx.HTTPError:
                    answer = None
                if answer is not None and answer.is_success and (counters := read(answer.text)):
                    self.samples.taken.append((time.monotonic() - self._start_s, counters))
                if stopping:
                    return
                try:
                    await asyncio.wait_for(self._stop.wait(), EVERY_S)
                except (TimeoutError, asyncio.TimeoutError):
                    continue

    def stop(self) -> None:
        self._stop.set()
