"""What a run adds up to: latencies and their percentiles, rates over the steady window, goodput, errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from afd.loadtest.drive import Run
from afd.loadtest.record import CANCELLED, Record
from afd.loadtest.slo import Slo
from afd.loadtest.window import Window

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of `count` values; NaN of none."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return Spread(
            len(ordered), fmean(ordered) if ordered else math.nan, *(percentile(ordered, p) for p in PERCENTILES)
        )


@dataclass(frozen=True, slots=True)
class Errors:
    """Requests that ended alike, and what one of them was told."""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Goodput:
    """`share`: of the counted requests, those that met the objectives; failed ones did not. Rates: of those alone, over
    the window."""

    slo: str
    share: float
    requests_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates are over the steady window, latencies of the counted requests (see afd.loadtest.window)."""

    sent: int
    answered: int
    counted: int
    run_s: float
    window: Window
    requests_per_s: float  # each counts as the part of its time that lies in the window
    input_tokens_per_s: float  # and so do its prompt's tokens
    output_tokens_per_s: float
    input_tokens: float  # mean of the counted requests
    output_tokens: float
    in_flight: float  # mean over the window
    context: float  # tokens that a decoded token saw, its mean over the counted requests
    tokens_by_server: bool  # every answer came with the server's own count
    late_p99_s: float  # how late this client sent, against the arrivals
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    e2e_s: Spread
    goodput: Goodput | None
    errors: dict[str, Errors]


def measure(run: Run, window: Window, slo: Slo | None) -> Measured:
    """Of a run that is over."""
    records = run.records
    counted = [record for record in window.counted(records) if record.status != CANCELLED]
    good = [record for record in counted if record.ok]
    tokens = sum(record.output_tokens for record in good)
    return Measured(
        sent=len(records),
        answered=sum(record.ok for record in records),
        counted=len(counted),
        run_s=max((record.end_s for record in records), default=0.0),
        window=window,
        requests_per_s=_rate(sum(_part(r, window) for r in records if r.ok), window),
        input_tokens_per_s=_rate(sum(r.input_tokens * _part(r, window) for r in records if r.ok), window),
        output_tokens_per_s=output_rate(records, window),
        input_tokens=_mean(r.input_tokens for r in good),
        output_tokens=_mean(r.output_tokens for r in good),
        in_flight=_rate(sum(_overlap(r, window) for r in records), window),
        context=sum(r.output_tokens * (r.input_tokens + (r.output_tokens - 1) / 2) for r in good) / tokens
        if tokens
        else math.nan,
        tokens_by_server=bool(good) and all(r.counted for r in good),
        late_p99_s=percentile(sorted(r.sent_s - r.due_s for r in records), 99),
        ttft_s=Spread.of(r.ttft_s for r in good if r.ttft_s is not None),
        tpot_s=Spread.of(r.tpot_s for r in good if r.tpot_s is not None),
        itl_s=Spread.of(itl for r in good for itl in r.itls_s),
        e2e_s=Spread.of(r.e2e_s for r in good),
        goodput=_goodput(counted, window, slo) if slo else None,
        errors=_errors(records),
    )


def output_rate(records: Iterable[Record], window: Window) -> float:
    """Output tokens per second: every event in the window counts as the tokens an event of its answer holds."""
    return _rate(sum(r.tokens_per_event * sum(map(window.holds, r.times)) for r in records), window)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values; between two neighbours, in proportion. NaN of none."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _goodput(counted: Sequence[Record], window: Window, slo: Slo) -> Goodput:
    met = [record for record in counted if slo.met_by(record)]
    return Goodput(
        str(slo),
        len(met) / len(counted) if counted else 0.0,
        _rate(sum(_part(record, window) for record in met), window),
        output_rate(met, window),
    )


def _errors(records: Sequence[Record]) -> dict[str, Errors]:
    """By status, most frequent first; over the whole run, warm-up included. What this client ended is no error."""
    failed = [record for record in records if not record.ok and record.status != CANCELLED]
    examples = {record.status: record.error for record in reversed(failed)}
    return {
        status: Errors(count, examples[status]) for status, count in Counter(r.status for r in failed).most_common()
    }


def _overlap(record: Record, window: Window) -> float:
    return max(0.0, min(record.end_s, window.end_s) - max(record.sent_s, window.start_s))


def _part(record: Record, window: Window) -> float:
    """Of the request's time, the share that lies in the window."""
    return _overlap(record, window) / record.e2e_s if record.e2e_s > 0 else 0.0


def _rate(amount: float, window: Window) -> float:
    return amount / window.seconds if window.seconds > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else math.nan
