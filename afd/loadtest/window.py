"""While the load was steady: the time that rates are taken over, and the requests that latencies are taken from.

The warm-up ends after a number of seconds, or once a number of requests have ended; by default it ends at once.

Rates (tokens and requests per second, busy shares) are taken over the steady window. It begins, at the end of the
warm-up or later,
- in a closed loop when every place has had a first token (until then prompts are computed that nobody decodes beside);
- in an open loop when the first request has ended (the number in flight grows from nothing until then: with answers
  that all take the same time it is as it stays from there on).
It ends
- in a closed loop with the first request that ends after the last was sent: its place stays empty;
- in an open loop when the last request is sent, or when --duration is over.
Where that leaves no time at all (a single request, a run of failures), the window is the whole run, from the first
sending to the last answer, and `steady` is false.

Latencies are of all requests sent from the end of the warm-up on, followed to their end, however late that is. Those
that were sent in the warm-up count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.loadtest.drive import Run
from afd.loadtest.record import Record


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Until `seconds` have passed and `requests` have ended."""

    seconds: float = 0.0
    requests: int = 0

    @staticmethod
    def parse(text: str) -> WarmUp:
        """`10s`: seconds; `20`: requests. Raises ConfigError."""
        try:
            found = WarmUp(seconds=float(text[:-1])) if text.endswith("s") else WarmUp(requests=int(text))
        except ValueError:
            found = WarmUp(seconds=-1)
        if not (0 <= found.seconds < math.inf and found.requests >= 0):
            raise ConfigError(f"--warmup is {text!r}; it is a time like 10s, or a number of requests like 20")
        return found


@dataclass(frozen=True, slots=True)
class Window:
    """`warm_s`: the warm-up's end. Rates are over start_s … end_s."""

    start_s: float
    end_s: float
    warm_s: float
    steady: bool

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def holds(self, at_s: float) -> bool:
        return self.start_s <= at_s < self.end_s

    def counted(self, records: Sequence[Record]) -> list[Record]:
        """Those whose latencies count."""
        return [record for record in records if record.sent_s >= self.warm_s]


def find(run: Run, warm_up: WarmUp) -> Window:
    """The steady window of a run that is over."""
    records = run.records
    ends = sorted(record.end_s for record in records)
    warm_s = max(warm_up.seconds, ends[warm_up.requests - 1] if 0 < warm_up.requests <= len(ends) else 0.0)
    if warm_up.requests > len(ends):
        warm_s = math.inf
    begin_s, end_s = _closed(run, ends) if run.concurrency else _open(run)
    begin_s = max(begin_s, warm_s)
    if begin_s < end_s:
        return Window(begin_s, end_s, warm_s, steady=True)
    return Window(min((r.sent_s for r in records), default=0.0), ends[-1] if ends else 0.0, warm_s, steady=False)


def _closed(run: Run, ends: list[float]) -> tuple[float, float]:
    first_tokens = sorted(record.times[0] for record in run.records if record.times)
    begin_s = first_tokens[run.concurrency - 1] if len(first_tokens) >= run.concurrency else math.inf
    return begin_s, next((end_s for end_s in ends if end_s > run.sent_all_s), 0.0)


def _open(run: Run) -> tuple[float, float]:
    return min((record.end_s for record in run.records if record.ok), default=math.inf), run.sent_all_s
