"""What Perfetto and chrome://tracing ask of a JSON trace, as far as ours use it (the Trace Event Format)."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Any

NUMBER = (int, float)
PHASES = {"X", "M", "s", "f"}
METADATA = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index"}


def check(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Asserts that every event is well-formed, that slices of a thread nest, that flows come in pairs and touch slices;
    the events by phase."""
    assert set(document) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    by_phase: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in document["traceEvents"]:
        _check_event(event)
        by_phase[event["ph"]].append(event)
    _check_names(by_phase["X"], by_phase["M"])
    _check_nesting(by_phase["X"])
    _check_flows(by_phase)
    return by_phase


def _check_event(event: dict[str, Any]) -> None:
    assert event["ph"] in PHASES, event
    assert isinstance(event["name"], str), event
    assert event["name"], event
    assert isinstance(event["pid"], int), event
    assert isinstance(event["tid"], int), event
    assert isinstance(event.get("args", {}), dict), event
    if event["ph"] == "M":
        assert METADATA[event["name"]] in event["args"], event
        return
    assert isinstance(event["cat"], str), event
    assert isinstance(event["ts"], NUMBER), event
    assert event["ts"] >= 0, event
    if event["ph"] == "X":
        assert isinstance(event["dur"], NUMBER), event
        assert event["dur"] >= 0, event
    else:
        assert isinstance(event["id"], int), event
    assert event["ph"] != "f" or event["bp"] == "e", f"an arrow that ends at the slice behind it: {event}"


def _check_names(slices: list[dict[str, Any]], names: list[dict[str, Any]]) -> None:
    processes = {event["pid"] for event in names if event["name"] == "process_name"}
    threads = {(event["pid"], event["tid"]) for event in names if event["name"] == "thread_name"}
    assert {event["pid"] for event in slices} <= processes, "a process without a name"
    assert {(event["pid"], event["tid"]) for event in slices} <= threads, "a thread without a name"


def _check_nesting(slices: list[dict[str, Any]]) -> None:
    """Ours do not nest at all: one follows the other."""
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in slices:
        threads[event["pid"], event["tid"]].append(event)
    for events in threads.values():
        events.sort(key=lambda event: (event["ts"], event["ts"] + event["dur"]))
        for before, after in itertools.pairwise(events):
            assert before["ts"] + before["dur"] <= after["ts"] + 5e-4, f"{before} and {after} overlap"


def _check_flows(by_phase: dict[str, list[dict[str, Any]]]) -> None:
    starts = {event["id"]: event for event in by_phase["s"]}
    ends = {event["id"]: event for event in by_phase["f"]}
    counts = Counter(event["id"] for phase in "sf" for event in by_phase[phase])
    assert set(counts.values()) <= {2}, "an arrow with one end"
    assert starts.keys() == ends.keys()
    begins = {(event["pid"], event["tid"], event["ts"]) for event in by_phase["X"]}
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"]), "the two ends do not belong together"
        for event in (start, end):
            assert (event["pid"], event["tid"], event["ts"]) in begins, f"no slice where {event} is"
