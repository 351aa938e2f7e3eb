"""A run over time, for plots."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from afd.loadtest.record import Record

Point = tuple[float, float]

_MOST_POINTS = 120
_STEPS_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


def output_rates(records: Sequence[Record], run_s: float) -> list[Point]:
    """Output tokens per second, in the middle of equal stretches."""
    step_s = _step_s(run_s)
    tokens = [0.0] * (int(run_s / step_s) + 1)
    for record in records:
        weight = record.tokens_per_event
        for at_s in record.times:
            tokens[min(int(at_s / step_s), len(tokens) - 1)] += weight
    # The last stretch is cut short by the run's end.
    lengths = [min(step_s, run_s - i * step_s) for i in range(len(tokens))]
    return [
        (i * step_s + length / 2, n / length)
        for i, (n, length) in enumerate(zip(tokens, lengths, strict=True))
        if length > 0.3 * step_s
    ]


def in_flight(records: Sequence[Record], run_s: float) -> list[Point]:
    """Requests that had been sent and not ended, at equal distances."""
    sent, ended = sorted(r.sent_s for r in records), sorted(r.end_s for r in records)
    at = [run_s * i / _MOST_POINTS for i in range(_MOST_POINTS + 1)]
    return [(t, float(bisect_right(sent, t) - bisect_right(ended, t))) for t in at]


def cdf(values: Sequence[float]) -> list[Point]:
    """The share of values that are at most x, in percent, at some 200 places."""
    ordered = sorted(values)
    count = len(ordered)
    places = range(count) if count <= 200 else sorted({round(i * (count - 1) / 200) for i in range(201)})
    points = [(ordered[i], 100 * (i + 1) / count) for i in places]
    return [(ordered[0], 0.0), *points] if ordered else []


def thinned(points: Sequence[Point], most: int = 1500) -> list[Point]:
    """At most so many of them, evenly chosen."""
    stride = -(-len(points) // most) or 1
    return list(points[::stride])


def _step_s(run_s: float) -> float:
    return next((step for step in _STEPS_S if run_s / step <= _MOST_POINTS), _STEPS_S[-1])
