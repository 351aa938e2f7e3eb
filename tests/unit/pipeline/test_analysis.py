"""From marks to causes: every wait has one, every share adds up, and clocks that differ do not matter."""

from __future__ import annotations

import itertools

import pytest

from afd.errors import Unavailable
from afd.pipeline.analysis import picture
from afd.pipeline.summary import summarise
from afd.pipeline.timeline import Activity, Recording, Timelines
from afd.types import Role
from tests.unit.pipeline.recordings import A, F, Hand, one_layer


def shares(found: object) -> object:
    return pytest.approx(found, abs=1e-9)


def test_a_dispatch_is_followed_to_the_ffn_worker_and_back() -> None:
    (journey,) = picture(one_layer(), 1.0).journeys
    assert journey.key == (0, 0, 0, 0)
    assert [(p.name, p.start_ns // 1000, p.end_ns // 1000) for p in journey.phases()] == [
        ("wire", 250, 300),
        ("queue", 300, 320),
        ("gather", 320, 400),
        ("ffn", 400, 600),
        ("wire back", 600, 700),
        ("ready", 700, 720),
    ]


def test_waits_are_charged_to_what_was_waited_for() -> None:
    summary = summarise(picture(one_layer(), 1.0))
    assert summary.window_s == pytest.approx(1e-3)
    attention, ffn = summary.workers
    assert attention.bubbles == shares(
        {"no work": 0.25, "ffn": 0.2, "wire back": 0.1, "gather": 0.08, "wire": 0.04, "queue": 0.02}
    )
    # Its first wait: the other side got ready, then wrote, then it was on the wire. Its last: nobody has work.
    assert ffn.bubbles["gather"] == shares(0.08)
    assert ffn.bubbles["schedule"] == shares(0.1)
    assert ffn.bubbles["attention"] == shares(0.1)
    assert ffn.bubbles["dispatch"] == shares(0.05)
    assert ffn.bubbles["wire"] == shares(0.05)
    assert ffn.bubbles["no work"] == shares(0.25)
    assert ffn.bubbles["unknown"] == shares(0.12), "from its answer to the other's idleness, with no dispatch to come"


def test_shares_add_up_to_the_window() -> None:
    for worker in summarise(picture(one_layer(), 1.0)).workers:
        assert sum(worker.activities.values()) == shares(1.0)
        assert sum(worker.bubbles.values()) == shares(1.0 - worker.busy)


def test_the_figures() -> None:
    summary = summarise(picture(one_layer(), 1.0))
    assert summary.busy == shares({"attention": 0.31, "ffn": 0.25})
    assert summary.efficiency == shares(0.31)
    assert summary.tokens_per_ffn_call == 10
    assert summary.dispatches_per_ffn_call == 1
    assert summary.tokens_per_expert_call == 5
    assert summary.wire_bytes_per_token_and_layer == 150
    assert summary.wire_bytes_per_token == 150
    assert summary.phases["ffn"].median_us == shares(200.0)


@pytest.mark.parametrize("behind_us", [-(10**9), 10**7])
def test_a_worker_on_another_clock_gives_the_same_picture(behind_us: int) -> None:
    here, there = picture(one_layer(), 1.0), picture(one_layer(behind_us), 1.0)
    assert there.journeys == here.journeys
    assert [w.activities for w in summarise(there).workers] == [w.activities for w in summarise(here).workers]
    assert [w.bubbles for w in summarise(there).workers] == [w.bubbles for w in summarise(here).workers]
    assert summarise(there).tokens_per_expert_call == 5, "experts are on the same clock"


def test_a_clock_that_is_a_little_wrong_gives_no_negative_time() -> None:
    """It says that the dispatch was taken 90 us before it was written."""
    found = picture(one_layer(behind_us=140, known=False), 1.0)
    (journey,) = found.journeys
    phases = journey.phases()
    assert all(phase.end_ns >= phase.start_ns for phase in phases)
    assert all(before.end_ns == after.start_ns for before, after in itertools.pairwise(phases))
    for worker in summarise(found).workers:
        assert sum(worker.bubbles.values()) == shares(1.0 - worker.busy)


def test_the_window_is_what_all_workers_cover() -> None:
    late, ffn = Hand(A).mark(400, Activity.IDLE).until(900), one_layer().recordings[1]
    found = picture(Timelines((late, ffn)), asked_s=1.0)
    assert (found.start_ns, found.end_ns) == (400_000, 900_000)
    assert all(sum(w.activities.values()) == shares(1.0) for w in summarise(found).workers)


def test_a_shorter_window_cuts_spans_at_its_start() -> None:
    found = picture(one_layer(), asked_s=500e-6)
    assert found.start_ns == 500_000
    attention, ffn = summarise(found).workers
    assert ffn.activities == shares({"idle": 0.74, "ffn": 0.2, "combine": 0.06})
    assert attention.activities["wait"] == shares(0.4)
    assert sum(attention.bubbles.values()) == shares(1.0 - attention.busy)


def test_a_call_for_two_attention_workers_answers_both_and_the_first_has_waited_for_the_second() -> None:
    def attention(rank: int, written_us: int) -> Recording:
        hand = Hand(A, rank).mark(0, Activity.ATTENTION, 1, 5, 2, tokens=4)
        hand.mark(written_us - 10, Activity.DISPATCH, 1, 5, 2, tokens=4).mark(written_us, Activity.WAIT)
        hand.mark(300, Activity.COLLECT, 1, 5, 2, tokens=4).mark(310, Activity.COMBINE, 1, 5, 2)
        return hand.until(400)

    ffn = Hand(F).mark(0, Activity.IDLE).mark(60, Activity.RECEIVE, 1, 5, 2, peer=0).mark(65, Activity.GATHER)
    ffn.mark(100, Activity.RECEIVE, 1, 5, 2, peer=1).mark(105, Activity.FFN, layer=2, tokens=8)
    ffn.mark(200, Activity.COMBINE, 1, 5, 2, peer=0).mark(210, Activity.COMBINE, 1, 5, 2, peer=1)
    found = picture(Timelines((attention(0, 50), attention(1, 90), ffn.until(400))), 1.0)
    first, second = found.journeys
    assert [j.key.attention_rank for j in (first, second)] == [0, 1]
    assert first.compute == second.compute
    assert (first.gathering_ns, second.gathering_ns) == (35_000, 0)
    summary = summarise(found)
    assert summary.tokens_per_ffn_call == 8
    assert summary.dispatches_per_ffn_call == 2
    assert summary.workers[0].bubbles["gather"] == shares(35 / 400)


def test_an_ffn_worker_that_waits_for_another_one_says_so() -> None:
    """1A2F: rank 0 answers at once, rank 1 computes for long, so rank 0's next dispatch is late because of rank 1."""
    attention = Hand(A).mark(0, Activity.DISPATCH, step=1).mark(10, Activity.WAIT)
    attention.mark(40, Activity.COLLECT, step=1, peer=0).mark(41, Activity.WAIT)
    attention.mark(500, Activity.COLLECT, step=1, peer=1).mark(510, Activity.COMBINE, step=1)
    attention.mark(520, Activity.DISPATCH, step=2).mark(530, Activity.WAIT)

    def ffn(rank: int, computed_us: int) -> Recording:
        hand = Hand(F, rank).mark(0, Activity.IDLE).mark(15, Activity.RECEIVE, step=1).mark(20, Activity.FFN)
        hand.mark(computed_us, Activity.COMBINE, step=1).mark(computed_us + 5, Activity.IDLE)
        return hand.mark(540, Activity.RECEIVE, step=2).until(550)

    summary = summarise(picture(Timelines((attention.until(550), ffn(0, 25), ffn(1, 490))), 1.0))
    quick = next(w for w in summary.workers if (w.role, w.rank) == (Role.FFN, 0))
    assert quick.bubbles["ffn"] * 550 == pytest.approx(490 - 41)


def test_what_is_missing_is_told() -> None:
    found = picture(Timelines(one_layer().recordings, ("ffn_rank 1 did not answer",)), 1.0)
    assert summarise(found).missing == ("ffn_rank 1 did not answer",)
    with pytest.raises(Unavailable, match="no worker has a timeline yet: ffn_rank 1 did not answer"):
        picture(Timelines((), ("ffn_rank 1 did not answer",)), 1.0)


def test_timelines_without_a_common_moment_are_refused() -> None:
    early = Hand(A).mark(0, Activity.IDLE).until(100)
    late = Hand(F).mark(200, Activity.IDLE).until(300)
    with pytest.raises(Unavailable, match="no moment in common"):
        picture(Timelines((early, late)), 1.0)


def test_a_dispatch_that_failed_or_is_under_way_is_no_journey() -> None:
    attention = Hand(A).mark(0, Activity.DISPATCH, step=1).mark(5, Activity.WAIT)
    attention.mark(30, Activity.COLLECT, step=1).mark(40, Activity.DISPATCH, step=2).mark(45, Activity.WAIT)
    ffn = Hand(F).mark(0, Activity.IDLE).mark(10, Activity.RECEIVE, step=1).mark(12, Activity.FFN)
    ffn.mark(20, Activity.IDLE).mark(50, Activity.RECEIVE, step=2).mark(52, Activity.FFN)
    found = picture(Timelines((attention.until(100), ffn.until(100))), 1.0)
    assert found.journeys == []
    for worker in summarise(found).workers:
        assert sum(worker.bubbles.values()) == shares(1.0 - worker.busy)
