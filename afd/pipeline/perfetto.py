"""A picture as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing: JSON in the Trace Event Format.

One process for each worker, with one thread for its own and, for an attention worker, one for each microbatch: what
became of it, wherever it was. Arrows go from a dispatch to the call that computed it, and from there to its combine.
"""

from __future__ import annotations

from collections.abc import Iterator

from afd.pipeline.analysis import Journey, Key, Picture, Span, Worker
from afd.pipeline.summary import as_json
from afd.pipeline.timeline import Activity
from afd.types import Role

Json = dict[str, object]

OWN_THREAD = 1
FIRST_MICROBATCH = 10  # thread of microbatch 0

_KEYED = frozenset(
    (Activity.ATTENTION, Activity.DISPATCH, Activity.COLLECT, Activity.COMBINE, Activity.RECEIVE)
)  # about one dispatch
_STEPS = frozenset((Activity.SCHEDULE, Activity.HEAD, Activity.SAMPLE))  # about a microbatch's step


def document(picture: Picture) -> Json:
    """The trace. Times in us since the window's start, exact to the ns; `otherData` says where that was, and has the
    summary."""
    pids = {(worker.role, worker.rank): i for i, worker in enumerate(picture.workers, start=1)}
    events = list(_names(picture, pids))
    for worker in picture.workers:
        pid = pids[worker.role, worker.rank]
        events += [_slice(picture, pid, OWN_THREAD, span) for span in picture.clipped(worker)]
        if worker.role is Role.ATTENTION:
            events += _microbatches(picture, pid, worker)
    events += _flows(picture, pids)
    other = {"start_ns": picture.start_ns, "window_s": picture.window_s, "summary": as_json(picture)}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _names(picture: Picture, pids: dict[tuple[Role, int], int]) -> Iterator[Json]:
    for worker in picture.workers:
        pid = pids[worker.role, worker.rank]
        yield _name("process_name", pid, 0, name=f"{worker.name} (pid {worker.pid})")
        yield _name("process_sort_index", pid, 0, sort_index=pid)
        yield _name("thread_name", pid, OWN_THREAD, name="engine" if worker.role is Role.ATTENTION else "FFN loop")
        for microbatch in sorted({span.microbatch for span in worker.spans if span.activity in _STEPS}):
            yield _name("thread_name", pid, FIRST_MICROBATCH + microbatch, name=f"microbatch {microbatch}")


def _name(what: str, pid: int, tid: int, **args: object) -> Json:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _slice(picture: Picture, pid: int, tid: int, span: Span, name: str = "") -> Json:
    args: Json = {}
    if span.activity in _KEYED:
        args = {"microbatch": span.microbatch, "step": span.step, "layer": span.layer}
    elif span.activity in _STEPS:
        args = {"microbatch": span.microbatch, "step": span.step}
    elif span.activity is Activity.FFN:
        args = {"layer": span.layer}
    if span.activity in (Activity.COLLECT, Activity.RECEIVE):
        args["from"] = span.peer
    if span.tokens:
        args["tokens"] = span.tokens
    if span.wire_bytes:
        args["bytes"] = span.wire_bytes
    return _complete(picture, pid, tid, name or span.activity.label, span.start_ns, span.end_ns, args)


def _complete(picture: Picture, pid: int, tid: int, name: str, start_ns: int, end_ns: int, args: Json) -> Json:
    ts, dur = (start_ns - picture.start_ns) / 1e3, (end_ns - start_ns) / 1e3
    return {"ph": "X", "cat": "afd", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def _microbatches(picture: Picture, pid: int, worker: Worker) -> Iterator[Json]:
    """What each microbatch went through, one after the other: its own spans, and of its dispatches' ways that of the
    answer that came last."""
    last: dict[Key, Journey] = {}
    for journey in picture.journeys:
        known = last.get(journey.key)
        if journey.key.attention_rank == worker.rank and (known is None or known.collected_ns < journey.collected_ns):
            last[journey.key] = journey
    for span in picture.clipped(worker):
        if span.activity in _STEPS or span.activity in (Activity.ATTENTION, Activity.DISPATCH, Activity.COMBINE):
            yield _slice(picture, pid, FIRST_MICROBATCH + span.microbatch, span)
    for key, journey in last.items():
        if picture.holds(journey.dispatch, journey.compute, journey.combine):
            args: Json = {"step": key.step, "layer": key.layer, "ffn_rank": journey.ffn_rank}
            for name, start_ns, end_ns in journey.phases():
                if end_ns > start_ns:
                    yield _complete(picture, pid, FIRST_MICROBATCH + key.microbatch, name, start_ns, end_ns, args)


def _flows(picture: Picture, pids: dict[tuple[Role, int], int]) -> Iterator[Json]:
    number = 0
    for journey in picture.journeys:
        if not picture.holds(journey.dispatch, journey.compute, journey.combine):
            continue
        attention, ffn = pids[Role.ATTENTION, journey.key.attention_rank], pids[Role.FFN, journey.ffn_rank]
        ends = ((attention, journey.dispatch), (ffn, journey.compute), (attention, journey.combine))
        for name, (pid, span), (to_pid, to) in zip(("dispatch", "combine"), ends, ends[1:], strict=False):
            number += 1
            flow = {"cat": "afd", "name": name, "id": number, "tid": OWN_THREAD}
            yield flow | {"ph": "s", "pid": pid, "ts": (span.start_ns - picture.start_ns) / 1e3}
            yield flow | {"ph": "f", "bp": "e", "pid": to_pid, "ts": (to.start_ns - picture.start_ns) / 1e3}
