"""A cluster of toys on every kind of host: starting, noticing, stopping."""

from __future__ import annotations

import os
import signal
import time

import pytest

from afd.cluster import local
from afd.config import Deployment
from afd.errors import CheckpointError, ClusterError
from afd.types import Role
from tests.unit.cluster.clusters import TOYS, OpenCluster, eventually, is_gone

START_S = 60.0


def deployment(script: str = "good", **flags: object) -> Deployment:
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    return Deployment().with_flags({"model": script, "topology": "2A2F", **dotted})


def test_all_workers_get_ready_and_attention_workers_meet_every_ffn_worker(open_cluster: OpenCluster) -> None:
    with open_cluster(deployment()) as cluster:
        assert cluster.wait_ready(START_S)
        view = cluster.view()
        assert [(w.role, w.rank, w.state) for w in view.workers] == [
            (Role.FFN, 0, "ready"),
            (Role.FFN, 1, "ready"),
            (Role.ATTENTION, 0, "ready"),
            (Role.ATTENTION, 1, "ready"),
        ]
        assert [w.address for w in view.workers if w.role is Role.ATTENTION] == ["127.0.0.1:1", "127.0.0.1:2"]
        assert view.problem == ""
        assert (view.model, view.topology) == ("good", "2A2F")
        eventually(lambda: all(w.pid and w.node for w in cluster.view().workers), 5.0)


def test_waiting_for_a_cluster_that_is_not_ready_is_bounded(open_cluster: OpenCluster) -> None:
    with open_cluster(deployment("ffn0:hang")) as cluster:
        began = time.monotonic()
        assert not cluster.wait_ready(0.1)
        assert time.monotonic() - began < 5.0


def test_a_worker_that_cannot_start_stops_the_others_and_its_own_error_is_raised(open_processes: OpenCluster) -> None:
    with open_processes(deployment("ffn1:refuse attention0:hang")) as cluster:
        with pytest.raises(CheckpointError, match=r"^ffn 1 does not like its weights$"):
            cluster.wait_ready(START_S)
        pids = [w.pid for w in cluster.view().workers if w.pid]
        assert all(is_gone(pid, 5.0) for pid in pids)


def test_a_worker_that_cannot_start_is_told_by_threads_too() -> None:
    flags = {"transport__kind": "inproc"}
    with local.cluster(deployment("ffn1:refuse", **flags), TOYS) as cluster, pytest.raises(CheckpointError):
        cluster.wait_ready(START_S)


def test_a_worker_that_dies_while_starting_is_named(open_processes: OpenCluster) -> None:
    with (
        open_processes(deployment("attention1:exit")) as cluster,
        pytest.raises(ClusterError, match=r"^attention_rank 1 .*exited"),
    ):
        cluster.wait_ready(START_S)


def test_a_worker_that_never_starts_is_named_with_the_limit_and_the_knob(open_cluster: OpenCluster) -> None:
    with (
        open_cluster(deployment("ffn0:hang", cluster__start_s=3.0)) as cluster,
        pytest.raises(ClusterError, match=r"ffn_rank 0.* did not start within 3 s \(cluster.start_s\)$"),
    ):
        cluster.wait_ready(START_S)


def test_a_killed_worker_is_lost_within_a_second_and_the_others_stay(open_processes: OpenCluster) -> None:
    with open_processes(deployment()) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: all(w.pid for w in cluster.view().workers), 5.0)
        victim = next(w for w in cluster.view().workers if w.role is Role.FFN and w.rank == 1)
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: cluster.view().problem, 1.0)
        view = cluster.view()
        assert f"ffn_rank 1 (pid {victim.pid}" in view.problem
        assert [w.state for w in view.workers] == ["ready", "lost", "ready", "ready"]


def test_a_worker_that_says_it_is_lost_is_marked_with_its_own_sentence(open_cluster: OpenCluster) -> None:
    with open_cluster(deployment("attention1:lose")) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: cluster.view().workers[3].state == "lost", 2.0)
        assert cluster.view().workers[3].message == "the wire was cut"
        assert cluster.view().problem == "", "an attention worker's loss does not end the service"


def test_stopping_ends_every_process_and_may_be_repeated(open_processes: OpenCluster) -> None:
    with open_processes(deployment()) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: all(w.pid for w in cluster.view().workers), 5.0)
        pids = [w.pid for w in cluster.view().workers]
        began = time.monotonic()
        cluster.stop(0.0)
        assert time.monotonic() - began < 5.0
        assert all(is_gone(pid, 1.0) for pid in pids)
        cluster.stop(0.0)


def test_a_worker_that_does_not_stop_is_killed(open_processes: OpenCluster) -> None:
    with open_processes(deployment("attention0:stuck")) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: all(w.pid for w in cluster.view().workers), 5.0)
        pids = [w.pid for w in cluster.view().workers]
        began = time.monotonic()
        cluster.stop(0.0)
        assert time.monotonic() - began < 9.0
        assert all(is_gone(pid, 1.0) for pid in pids)


def test_a_cluster_can_be_stopped_while_it_starts(open_cluster: OpenCluster) -> None:
    with open_cluster(deployment("ffn0:hang")) as cluster:
        cluster.wait_ready(0.5)
        began = time.monotonic()
        cluster.stop(0.0)
        assert time.monotonic() - began < 9.0


def test_two_clusters_do_not_share_an_epoch() -> None:
    with local.cluster(deployment(), TOYS) as one, local.cluster(deployment(), TOYS) as other:
        assert one.view().epoch != other.view().epoch


@pytest.mark.parametrize("open_processes", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_when_the_controller_is_gone_every_worker_is_shown_as_lost(open_processes: OpenCluster) -> None:
    with open_processes(deployment()) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: all(w.pid for w in cluster.view().workers), 5.0)
        pids = [w.pid for w in cluster.view().workers]
        controller: int = cluster._controller.pid  # type: ignore[attr-defined]
        os.kill(controller, signal.SIGKILL)
        eventually(lambda: cluster.view().problem, 2.0)
        assert f"controller (pid {controller}" in cluster.view().problem
        assert {w.state for w in cluster.view().workers} == {"lost"}
        assert all(is_gone(pid, 10.0) for pid in pids), "an actor ends with the one that owns it"
