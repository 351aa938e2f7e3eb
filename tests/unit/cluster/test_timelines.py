"""Collecting timelines: on one clock, from who answers, naming who does not."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest

from afd.cluster import timelines
from afd.cluster.host import Handle
from afd.cluster.timelines import Offset, collect, offset
from afd.config import Deployment
from afd.errors import ClusterError
from afd.pipeline.timeline import Activity, Recording, Timeline
from afd.types import Role
from tests.unit.cluster.clusters import OpenCluster, eventually


class Far(Handle):
    """A worker on another host: its clock is `ahead_ns` ahead, and a call takes `trip_s` there and as long back."""

    def __init__(self, name: str, ahead_ns: int = 0, trip_s: float = 0.0, error: Exception | None = None) -> None:
        self.name, self.ahead_ns, self.trip_s, self.error = name, ahead_ns, trip_s, error
        self.timeline = Timeline(Role.FFN, 0, capacity=1 << 10)
        self.asked: list[tuple[int, int]] = []

    def submit(self, method: str, *args: Any) -> Future[Any]:
        assert method == "timeline"
        since_ns, max_events = args
        self.asked.append((since_ns, max_events))
        answer: Future[Any] = Future()
        if self.error is not None:
            answer.set_exception(self.error)
            return answer
        time.sleep(self.trip_s)
        here = self.timeline.since(since_ns - self.ahead_ns, max_events)
        time.sleep(self.trip_s)
        answer.set_result(Recording(here.role, here.rank, here.pid, here.now_ns + self.ahead_ns, here.packed))
        return answer

    def kill(self) -> None:
        pass


class Silent(Far):
    def submit(self, method: str, *args: Any) -> Future[Any]:
        return Future()


def test_a_time_inside_the_round_trip_is_our_own_clock() -> None:
    assert offset(100, 150, 200) == Offset(0, 0)
    assert offset(100, 100, 100) == Offset(0, 0)


@pytest.mark.parametrize(("theirs", "found"), [(1_000, -900), (10, 90), (-5_000, 5_100)])
def test_another_clock_is_taken_half_way_and_is_wrong_by_half_the_trip_at_most(theirs: int, found: int) -> None:
    assert offset(80, theirs, 120) == Offset(found, 20)


def test_the_offset_of_another_host_is_found_within_its_uncertainty() -> None:
    hour_ns = 3_600_000_000_000
    far = Far("ffn_rank 0", hour_ns, trip_s=0.001)
    (recording,) = collect([far], 1.0, 100).recordings
    assert 1e6 <= recording.uncertainty_ns < 0.1e9
    assert abs(recording.offset_ns + hour_ns) <= recording.uncertainty_ns


def test_a_worker_of_this_host_needs_no_correction() -> None:
    (recording,) = collect([Far("ffn_rank 0")], 1.0, 100).recordings
    assert (recording.offset_ns, recording.uncertainty_ns) == (0, 0)


def test_events_are_shared_out_over_the_workers() -> None:
    workers = [Far(f"ffn_rank {rank}") for rank in range(4)]
    for worker in workers:
        for step in range(100):
            worker.timeline.mark(Activity.FFN, step=step)
    found = collect(workers, 5.0, 40)
    assert [len(list(recording.events())) for recording in found.recordings] == [10, 10, 10, 10]
    assert [share for _, share in workers[0].asked] == [0] * timelines.PROBES + [10]


def test_all_are_asked_for_what_they_did_since_one_moment() -> None:
    """However long the answers take, and whatever their clocks say, they have all of the time asked for in common."""
    hour_ns = 3_600_000_000_000
    workers = [Far("ffn_rank 0"), Far("ffn_rank 1", hour_ns, 0.05), Far("ffn_rank 2", -hour_ns, 0.05)]
    began_ns = time.monotonic_ns()
    found = collect(workers, 0.01, 100)
    for worker, recording in zip(workers, found.recordings, strict=True):
        since_ns = worker.asked[-1][0] + recording.offset_ns
        assert since_ns == pytest.approx(began_ns - 10_000_000, abs=1e6 + recording.uncertainty_ns)
        assert recording.now_ns + recording.offset_ns >= began_ns


def test_who_fails_or_is_silent_is_named_and_the_others_are_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "ANSWER_S", 0.2)
    dead = Far("ffn_rank 1", error=ClusterError("exited with code 7"))
    began = time.monotonic()
    found = collect([Far("ffn_rank 0"), dead, Silent("ffn_rank 2")], 1.0, 100)
    assert time.monotonic() - began < 2.0
    assert len(found.recordings) == 1
    assert found.missing == (
        "ffn_rank 1: exited with code 7",
        "ffn_rank 2 did not send its timeline within 0.2 s",
    )


def test_a_cluster_gives_every_workers_timeline_and_totals(open_cluster: OpenCluster) -> None:
    deployment = Deployment().with_flags({"model": "ffn1:forget", "topology": "2A2F"})
    with open_cluster(deployment) as cluster:
        assert cluster.wait_ready(60.0)
        found = cluster.timelines(5.0, 1000)
        names = {(recording.role, recording.rank) for recording in found.recordings}
        assert names == {(Role.ATTENTION, 0), (Role.ATTENTION, 1), (Role.FFN, 0)}
        assert all(recording.offset_ns == 0 for recording in found.recordings)
        assert found.missing == ("ffn_rank 1: ffn 1 does not remember",)
        eventually(lambda: all(worker.totals for worker in cluster.view().workers), 10.0)
        forgetful = next(w for w in cluster.view().workers if (w.role, w.rank) == (Role.FFN, 1))
        assert forgetful.counters == {"deeds": 1}
