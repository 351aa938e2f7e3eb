"""Why the workers waited, as counters: what short looks at their timelines add up to."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from afd.errors import AfdError
from afd.pipeline import analysis, summary
from router.telemetry.debug import Timelines

log = logging.getLogger(__name__)

# A look costs this process some 7 us an event: less than 0.3 % of a core.
EVERY_S = 5.0  # from the end of one look to the next
WINDOW_S = 0.2
MAX_EVENTS = 2_000  # over all workers; where they make more in WINDOW_S, the window is shorter

Worker = tuple[str, str]  # role and rank


class Bubbles(Collector):
    """Belongs to the event loop that runs `run`. It has seen parts of the time only, and says how much of it: nothing
    is scaled up. Workers that are gone keep what was seen of them, as counters do."""

    def __init__(self, timelines: Timelines) -> None:
        self._timelines = timelines
        self._seen_s: defaultdict[Worker, float] = defaultdict(float)
        self._waited_s: defaultdict[tuple[Worker, str], float] = defaultdict(float)

    async def run(self, every_s: float = EVERY_S) -> None:
        """Looks again and again, until it is cancelled. What cannot be seen is left out."""
        while True:
            await asyncio.sleep(every_s)
            try:
                self._add(await asyncio.to_thread(self._look))
            except AfdError as error:
                log.debug("no look at the workers' bubbles: %s", error)
            except Exception:
                log.exception("a look at the workers' bubbles failed")

    def _look(self) -> summary.Summary:
        return summary.summarise(analysis.picture(self._timelines(WINDOW_S, MAX_EVENTS), asked_s=WINDOW_S))

    def _add(self, look: summary.Summary) -> None:
        for worker in look.workers:
            key = (worker.role.value, str(worker.rank))
            self._seen_s[key] += look.window_s
            for cause, share in worker.bubbles.items():
                self._waited_s[key, cause] += share * look.window_s

    def collect(self) -> Iterator[Metric]:
        text = (
            f"What workers waited for, as afd trace --summary names it, in looks at their timelines: at most "
            f"{WINDOW_S:g} of every {EVERY_S:g} seconds, not scaled up. Its rate over that of "
            f"afd_bubble_window_seconds_total is a share of the worker's time."
        )
        waited = CounterMetricFamily("afd_bubble_seconds", text, labels=["role", "rank", "cause"])
        for (worker, cause), seconds in self._waited_s.items():
            waited.add_metric([*worker, cause], seconds)
        text = "How much of each worker's time afd_bubble_seconds_total has seen."
        seen = CounterMetricFamily("afd_bubble_window_seconds", text, labels=["role", "rank"])
        for worker, seconds in self._seen_s.items():
            seen.add_metric(worker, seconds)
        yield from (waited, seen)
