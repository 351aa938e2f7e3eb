"""The trace as a viewer reads it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from afd.pipeline import perfetto
from afd.pipeline.analysis import picture
from tests import chrome_trace
from tests.unit.pipeline.recordings import one_layer


@pytest.fixture
def trace() -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(perfetto.document(picture(one_layer(), 1.0))))
    return written


def test_it_is_well_formed_and_has_an_arrow_there_and_one_back(trace: dict[str, Any]) -> None:
    events = chrome_trace.check(trace)
    assert [event["name"] for event in events["s"]] == ["dispatch", "combine"]
    assert [(event["ts"], event["pid"]) for event in events["s"]] == [(200.0, 1), (400.0, 2)]
    assert [(event["ts"], event["pid"]) for event in events["f"]] == [(400.0, 2), (720.0, 1)]


def test_workers_and_microbatches_have_names(trace: dict[str, Any]) -> None:
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M" and "name" in e["args"]]
    assert names == ["attention_rank 0 (pid 1)", "engine", "microbatch 0", "ffn_rank 0 (pid 1)", "FFN loop"]


def test_a_microbatch_is_followed_wherever_it_is(trace: dict[str, Any]) -> None:
    track = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == perfetto.FIRST_MICROBATCH]
    track.sort(key=lambda event: event["ts"])
    assert [event["name"] for event in track] == [
        *("schedule", "attention", "dispatch", "wire", "queue", "gather", "ffn", "wire back", "ready", "combine")
    ]
    for before, after in itertools.pairwise(track):
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=1e-6)


def test_a_worker_is_never_without_a_slice(trace: dict[str, Any]) -> None:
    for pid in (1, 2):
        own = [e for e in trace["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, 1)]
        assert sum(event["dur"] for event in own) == pytest.approx(1000.0)


def test_what_is_cut_off_by_the_window_has_no_arrows() -> None:
    events = chrome_trace.check(perfetto.document(picture(one_layer(), 300e-6)))
    assert not events["s"]
    assert events["X"]


def test_the_schema_check_notices_what_a_viewer_would_stumble_over(trace: dict[str, Any]) -> None:
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    arrow = next(event for event in trace["traceEvents"] if event["ph"] == "f")
    for event, change in [
        (slices[0], {"dur": "1"}),
        (slices[0], {"dur": 1e6}),
        (slices[0], {"pid": 99}),
        (slices[0], {"ts": -1.0}),
        (arrow, {"id": 77}),
        (arrow, {"ts": 3.0}),
    ]:
        before = dict(event)
        event.update(change)
        with pytest.raises(AssertionError):
            chrome_trace.check(trace)
        event.clear()
        event.update(before)
    chrome_trace.check(trace)
