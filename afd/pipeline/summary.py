"""What a picture adds up to: how busy each side is, why it is not, and how large the calls and messages are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, median

from afd.pipeline.analysis import Journey, Picture, Span, Worker, overlapping
from afd.pipeline.timeline import WAITING, Activity
from afd.types import Role

NO_WORK, UNKNOWN = "no work", "unknown"


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """Shares of the window: `activities` add up to 1, and `bubbles`, by cause, to 1 - busy. `spans`: how many."""

    name: str
    role: Role
    rank: int
    pid: int
    clock_error_us: float
    spans: int
    busy: float
    activities: Mapping[str, float]
    bubbles: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PhaseSummary:
    """One part of the dispatches' way to the FFN side and back."""

    mean_us: float
    median_us: float


@dataclass(frozen=True, slots=True)
class Summary:
    """`busy` and `bubbles` are means over the workers of a role. A figure is None where the window holds none."""

    asked_s: float
    window_s: float
    workers: tuple[WorkerSummary, ...]
    busy: Mapping[str, float]  # by role
    bubbles: Mapping[str, Mapping[str, float]]  # by role and cause
    efficiency: float  # max(busy of attention, busy of FFN)
    phases: Mapping[str, PhaseSummary]
    sampled_tokens_per_s: float
    tokens_per_dispatch: float | None
    dispatches_per_ffn_call: float | None
    tokens_per_ffn_call: float | None
    tokens_per_expert_call: float | None
    wire_bytes_per_token_and_layer: float | None  # there and back
    wire_bytes_per_token: float | None  # over all layers
    missing: tuple[str, ...]


def as_json(picture: Picture) -> dict[str, object]:
    """The summary as JSON knows it."""
    return asdict(summarise(picture))


def summarise(picture: Picture) -> Summary:
    """Raises nothing: a picture has at least one worker and a window."""
    workers = tuple(_Bubbles(picture).worker(worker) for worker in picture.workers)
    by_role = {role.value: [w for w in workers if w.role is role] for role in Role}
    busy = {role: fmean(w.busy for w in some) if some else 0.0 for role, some in by_role.items()}
    attention = [list(picture.clipped(worker)) for worker in picture.of(Role.ATTENTION)]
    ffn = [list(picture.clipped(worker)) for worker in picture.of(Role.FFN)]
    dispatches, calls, taken = _of(attention, Activity.DISPATCH), _of(ffn, Activity.FFN), _of(ffn, Activity.RECEIVE)
    experts = [e for w in picture.workers for e in w.experts if picture.start_ns <= e.at_ns <= picture.end_ns]
    wire_bytes = sum(s.wire_bytes for s in (*taken, *_of(attention, Activity.COLLECT)))
    per_layer = _ratio(wire_bytes, sum(s.tokens for s in dispatches))
    layers = len({s.layer for s in dispatches})
    return Summary(
        asked_s=picture.asked_s,
        window_s=picture.window_s,
        workers=workers,
        busy=busy,
        bubbles={role: _mean(w.bubbles for w in some) for role, some in by_role.items()},
        efficiency=max(busy.values()),
        phases=_phases(picture),
        sampled_tokens_per_s=sum(s.tokens for s in _of(attention, Activity.SAMPLE)) / picture.window_s,
        tokens_per_dispatch=_ratio(sum(s.tokens for s in dispatches), len(dispatches)),
        dispatches_per_ffn_call=_ratio(len(taken), len(calls)),
        tokens_per_ffn_call=_ratio(sum(s.tokens for s in calls), len(calls)),
        tokens_per_expert_call=_ratio(sum(e.tokens for e in experts), sum(e.calls for e in experts)),
        wire_bytes_per_token_and_layer=per_layer,
        wire_bytes_per_token=None if per_layer is None else per_layer * layers,
        missing=picture.missing,
    )


class _Bubbles:
    """Finds out why workers waited. An attention worker's wait is charged to where the answer was that ended it; an
    FFN worker's, to what the attention worker did that then sent the dispatch (and where that one waited, to what it
    waited for), or to the wire."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._attention = {worker.rank: worker.spans for worker in picture.of(Role.ATTENTION)}
        self._starts = {rank: [span.start_ns for span in spans] for rank, spans in self._attention.items()}
        self._answers = {rank: _next(spans, Activity.COLLECT) for rank, spans in self._attention.items()}
        self._journeys = {(*j.key, j.ffn_rank): j for j in picture.journeys}

    def worker(self, worker: Worker) -> WorkerSummary:
        window_ns = self._picture.end_ns - self._picture.start_ns
        activities: Counter[str] = Counter()
        causes: Counter[str] = Counter()
        spans = list(self._picture.clipped(worker))
        arrivals = _next(spans, Activity.COLLECT if worker.role is Role.ATTENTION else Activity.RECEIVE)
        for span, arrival in zip(spans, arrivals, strict=True):
            activities[span.activity.label] += span.end_ns - span.start_ns
            if span.activity in WAITING:
                for cause, ns in self._causes(worker, span, arrival):
                    causes[cause] += ns
        waited_ns = sum(activities[activity.label] for activity in WAITING)
        return WorkerSummary(
            worker.name,
            worker.role,
            worker.rank,
            worker.pid,
            worker.uncertainty_ns / 1e3,
            len(spans),
            1 - waited_ns / window_ns,
            _shares(activities, window_ns),
            _shares(causes, window_ns),
        )

    def _causes(self, worker: Worker, wait: Span, arrival: Span | None) -> Iterator[tuple[str, int]]:
        """Parts of `wait` that add up to it. `arrival` is what came next."""
        whole_ns = wait.end_ns - wait.start_ns
        if wait.activity is Activity.GATHER:
            yield "gather", whole_ns
        elif worker.role is Role.ATTENTION:
            if wait.activity is Activity.IDLE:
                yield NO_WORK, whole_ns
            else:
                yield from _rest(whole_ns, self._while_answering(worker.rank, wait, arrival))
        else:
            yield from _rest(whole_ns, self._while_asking(worker, wait, arrival))

    def _while_answering(self, attention_rank: int, wait: Span, arrival: Span | None) -> Iterator[tuple[str, int]]:
        journey = arrival and self._journey(attention_rank, arrival, arrival.peer)
        for phase in journey.phases() if journey else ():
            both_ns = min(wait.end_ns, phase.end_ns) - max(wait.start_ns, phase.start_ns)
            if both_ns > 0:
                yield phase.name, both_ns

    def _while_asking(self, worker: Worker, wait: Span, arrival: Span | None) -> Iterator[tuple[str, int]]:
        if arrival is None:
            yield NO_WORK, min((self._idle_ns(rank, wait) for rank in self._attention), default=0)
            return
        if arrival.peer not in self._attention:
            return
        journey = self._journey(arrival.peer, arrival, worker.rank)
        written_ns = journey.dispatch.end_ns if journey else wait.end_ns
        until_ns = min(max(written_ns, wait.start_ns), wait.end_ns)
        spans, starts = self._attention[arrival.peer], self._starts[arrival.peer]
        for i in overlapping(spans, starts, wait.start_ns, until_ns):
            start_ns, end_ns = max(spans[i].start_ns, wait.start_ns), min(spans[i].end_ns, until_ns)
            part = spans[i]._replace(start_ns=start_ns, end_ns=end_ns)
            if part.activity is Activity.WAIT:
                answering = self._while_answering(arrival.peer, part, self._answers[arrival.peer][i])
                yield from _rest(end_ns - start_ns, answering)
            else:
                yield NO_WORK if part.activity is Activity.IDLE else part.activity.label, end_ns - start_ns
        yield "wire", wait.end_ns - until_ns

    def _idle_ns(self, attention_rank: int, wait: Span) -> int:
        """How much of an FFN worker's wait this attention worker had nothing to do."""
        spans, starts = self._attention[attention_rank], self._starts[attention_rank]
        both = [spans[i] for i in overlapping(spans, starts, wait.start_ns, wait.end_ns)]
        idle = [span for span in both if span.activity is Activity.IDLE]
        return sum(min(span.end_ns, wait.end_ns) - max(span.start_ns, wait.start_ns) for span in idle)

    def _journey(self, attention_rank: int, arrival: Span, ffn_rank: int) -> Journey | None:
        return self._journeys.get((attention_rank, arrival.microbatch, arrival.step, arrival.layer, ffn_rank))


def _rest(whole_ns: int, parts: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The parts, and what they leave of the whole: nothing ended the wait in the window, or it cannot be matched."""
    for cause, ns in parts:
        whole_ns -= ns
        yield cause, ns
    yield UNKNOWN, whole_ns


def _next(spans: list[Span], activity: Activity) -> list[Span | None]:
    """For each span, the first of `activity` at or after it."""
    found: list[Span | None] = []
    coming: Span | None = None
    for span in reversed(spans):
        coming = span if span.activity is activity else coming
        found.append(coming)
    return found[::-1]


def _phases(picture: Picture) -> dict[str, PhaseSummary]:
    lengths: dict[str, list[float]] = defaultdict(list)
    for journey in picture.journeys:
        if picture.holds(journey.dispatch, journey.compute, journey.combine):
            for phase in journey.phases():
                lengths[phase.name].append((phase.end_ns - phase.start_ns) / 1e3)
    return {name: PhaseSummary(fmean(us), median(us)) for name, us in lengths.items()}


def _of(workers: Iterable[Iterable[Span]], activity: Activity) -> list[Span]:
    return [span for spans in workers for span in spans if span.activity is activity]


def _shares(ns: Counter[str], window_ns: int) -> dict[str, float]:
    """Largest first; nothing that is nothing."""
    return {name: part / window_ns for name, part in ns.most_common() if part}


def _mean(shares: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of several workers' shares, by name; largest first."""
    workers = list(shares)
    sums: defaultdict[str, float] = defaultdict(float)
    for worker in workers:
        for name, share in worker.items():
            sums[name] += share / len(workers)
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None
