"""The lanes of hand-written timelines."""

from __future__ import annotations

from typing import Any

from afd.pipeline import lanes
from afd.pipeline.analysis import picture
from afd.pipeline.timeline import Activity, Timelines
from tests.unit.pipeline.recordings import A, F, Hand, one_layer


def drawn(timelines: Timelines) -> dict[str, Any]:
    return lanes.as_json(picture(timelines, asked_s=5.0))


def lane(document: dict[str, Any], role: str, rank: int = 0) -> list[tuple[int, str, Any]]:
    """When, what and whose (attention_rank, microbatch), or None."""
    found = next(one for one in document["lanes"] if (one["role"], one["rank"]) == (role, rank))
    owners = {i: (o["attention_rank"], o["microbatch"]) for i, o in enumerate(document["microbatches"])}
    columns = zip(found["start_us"], found["activity"], found["microbatch"], strict=True)
    return [(start, document["activities"][activity], owners.get(owner)) for start, activity, owner in columns]


def test_every_span_is_in_its_lane_and_says_whose_it_is() -> None:
    document = drawn(one_layer())
    assert document["window_us"] == 1000
    assert [span for span in lane(document, "attention") if span[1] != "other"] == [
        (0, "schedule", (0, 0)),
        (100, "attention", (0, 0)),
        (200, "dispatch", (0, 0)),
        (260, "wait", None),
        (700, "collect", (0, 0)),
        (720, "combine", (0, 0)),
        (750, "idle", None),
    ]
    assert (400, "ffn", (0, 0)) in lane(document, "ffn")


def test_a_call_belongs_to_whom_it_answers_and_to_nobody_where_they_are_several() -> None:
    attention = [Hand(A, rank).mark(0, Activity.IDLE).until(1000) for rank in (0, 1)]
    ffn = (
        Hand(F)
        .mark(0, Activity.RECEIVE, 2, peer=1)
        .mark(100, Activity.FFN)
        .mark(200, Activity.COMBINE, 2, peer=1)
        .mark(300, Activity.FFN)
        .mark(400, Activity.COMBINE, 0, peer=0)
        .mark(500, Activity.COMBINE, 2, peer=1)
        .mark(600, Activity.FFN)  # not answered yet
    )
    document = drawn(Timelines((*attention, ffn.until(1000))))
    assert lane(document, "ffn") == [
        (0, "receive", (1, 2)),
        (100, "ffn", (1, 2)),
        (200, "combine", (1, 2)),
        (300, "ffn", None),
        (400, "combine", (0, 0)),
        (500, "combine", (1, 2)),
        (600, "ffn", None),
    ]
