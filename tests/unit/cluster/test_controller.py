"""A cluster of toys on every kind of host: starting, noticing, stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import psutil
import pytest

from afd.cluster import local
from afd.cluster.controller import Cluster, Controller
from afd.cluster.host import Handle, settle
from afd.cluster.inproc import ThreadHandle, ThreadHost
from afd.config import Deployment, Resources
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


def test_a_worker_that_dies_while_the_others_connect_ends_it_at_once(open_processes: OpenCluster) -> None:
    """transport.connect_s is a minute."""
    with open_processes(deployment("ffn1:vanish attention0:deaf")) as cluster:
        with pytest.raises(ClusterError, match=r"^ffn_rank 1 .*exited"):
            cluster.wait_ready(30.0)
        assert all(is_gone(w.pid, 5.0) for w in cluster.view().workers if w.pid)


class Uncalled(Future[Any]):
    """Whose callbacks are late for ever; who waits for it is woken."""

    def add_done_callback(self, fn: object) -> None:
        pass


class LateHandle(ThreadHandle):
    def submit(self, method: str, *args: object) -> Future[Any]:
        answer, late = super().submit(method, *args), Uncalled()
        answer.add_done_callback(lambda done: settle(late, (done.result(), None)))
        return late if method == "start" else answer


class OddHost(ThreadHost):
    """Gives handles of the class `kind`."""

    def __init__(self, kind: type[ThreadHandle]) -> None:
        self._kind = kind

    def spawn(self, name: str, role: str, args: tuple[object, ...], resources: Resources) -> Handle:
        return self._kind(name, role, args)


def test_every_address_is_known_before_connecting_however_late_callbacks_run() -> None:
    with closing(OddHost(LateHandle)) as host:
        controller = Controller(deployment(), host, TOYS, epoch=1)
        controller.begin()
        try:
            assert controller.wait_ready(START_S)
            assert all(w.address for w in controller.view().workers if w.role is Role.ATTENTION)
        finally:
            controller.stop(0.0)


class StuckHandle(ThreadHandle):
    """Not even asking it for its status comes to an end."""

    asked = threading.Event()
    let_go = threading.Event()

    def submit(self, method: str, *args: object) -> Future[Any]:
        if method == "status":
            self.asked.set()
            self.let_go.wait()
        return super().submit(method, *args)


def test_stopping_does_not_wait_for_ever_for_the_controllers_own_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("afd.cluster.controller.END_S", 0.2)
    with closing(OddHost(StuckHandle)) as host:
        controller = Controller(deployment(), host, TOYS, epoch=1)
        controller.begin()
        assert StuckHandle.asked.wait(START_S)
        controller.stop(0.0)
        assert "did not end within 0.2 s" in caplog.text
        StuckHandle.let_go.set()


def test_a_worker_that_never_starts_is_named_with_the_limit_and_the_knob(open_cluster: OpenCluster) -> None:
    with (
        open_cluster(deployment("ffn0:hang", cluster__start_s=3.0)) as cluster,
        pytest.raises(ClusterError, match=r"ffn_rank 0.* did not start within 3 s \(cluster.start_s\)$"),
    ):
        cluster.wait_ready(START_S)


def test_a_killed_worker_that_may_not_start_again_is_lost_within_a_second_and_the_others_stay(
    open_processes: OpenCluster,
) -> None:
    with open_processes(deployment(cluster__restarts=0)) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: all(w.pid for w in cluster.view().workers), 5.0)
        victim = next(w for w in cluster.view().workers if w.role is Role.FFN and w.rank == 1)
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: cluster.view().problem, 1.0)
        view = cluster.view()
        assert f"ffn_rank 1 (pid {victim.pid}" in view.problem
        assert "cluster.restarts is 0" in view.problem
        assert [w.state for w in view.workers] == ["ready", "lost", "ready", "ready"]


def test_a_worker_that_says_it_is_lost_is_marked_with_its_own_sentence(open_cluster: OpenCluster) -> None:
    with open_cluster(deployment("attention1:lose", cluster__restarts=0)) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: cluster.view().workers[3].state == "lost", 2.0)
        assert cluster.view().workers[3].message.startswith("the wire was cut")
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


def pids_of(cluster: Cluster) -> list[int]:
    eventually(lambda: all(w.pid for w in cluster.view().workers), 5.0)
    return [w.pid for w in cluster.view().workers]


def lives_met(cluster: Cluster) -> list[object]:
    """Which lives of FFN workers each attention worker says it has met."""
    return [w.counters.get("lives") for w in cluster.view().workers if w.role is Role.ATTENTION]


def all_ready(cluster: Cluster) -> bool:
    return [w.state for w in cluster.view().workers] == ["ready"] * 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_workers_of_both_roles_come_back_and_meet_the_others(
    open_processes: OpenCluster, how: signal.Signals
) -> None:
    with open_processes(deployment(cluster__silent_s=1.0, cluster__standby_ffn=1)) as cluster:
        assert cluster.wait_ready(START_S)
        before, met = pids_of(cluster), lives_met(cluster)
        for index in (1, 2):  # ffn_rank 1, attention_rank 0
            os.kill(before[index], how)
        eventually(lambda: not all_ready(cluster), 10.0)
        eventually(lambda: all_ready(cluster) and len({*pids_of(cluster), *before}) == 6, START_S)
        eventually(lambda: lives_met(cluster)[0] == lives_met(cluster)[1] != met[0], 10.0)
        assert all(is_gone(before[index], 5.0) for index in (1, 2)), "a frozen process was left behind"
        pids = pids_of(cluster)
        cluster.stop(0.0)
        assert all(is_gone(pid, 5.0) for pid in pids)


@pytest.mark.parametrize("open_processes", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_a_killed_controller_is_started_again_and_finds_the_workers_that_served_on(
    open_processes: OpenCluster,
) -> None:
    with open_processes(deployment()) as cluster:
        assert cluster.wait_ready(START_S)
        before = pids_of(cluster)
        handle = cluster._controller  # type: ignore[attr-defined]
        eventually(lambda: handle.pid, 5.0)
        first = handle.pid
        seen = list[int]()
        os.kill(first, signal.SIGKILL)
        eventually(lambda: seen.append(len(cluster.view().workers)) or handle.pid != first, START_S)  # type: ignore[func-returns-value]
        eventually(lambda: seen.append(len(cluster.view().workers)) or all_ready(cluster), START_S)  # type: ignore[func-returns-value]
        assert set(seen) == {4}, "a worker seemed to have left the cluster"
        assert pids_of(cluster) == before
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: all_ready(cluster) and pids_of(cluster)[0] != before[0], START_S)
        pids = pids_of(cluster)
        assert pids[1:] == before[1:]
        cluster.stop(0.0)
        assert all(is_gone(pid, 5.0) for pid in pids)


@pytest.mark.parametrize("open_cluster", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_a_view_right_after_ready_shows_every_worker_ready(open_cluster: OpenCluster) -> None:
    with open_cluster(deployment()) as cluster:
        cluster.view()
        assert cluster.wait_ready(START_S)
        assert [w.state for w in cluster.view().workers] == ["ready"] * 4


@pytest.mark.parametrize("open_processes", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_a_frozen_controller_holds_nobody_up_and_loses_no_worker(
    open_processes: OpenCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afd.cluster.ray_host.ASK_S", 0.3)
    with open_processes(deployment(cluster__restarts=0)) as cluster:
        assert cluster.wait_ready(START_S)
        eventually(lambda: cluster._controller.pid, 5.0)  # type: ignore[attr-defined]
        controller = psutil.Process(cluster._controller.pid)  # type: ignore[attr-defined]
        controller.suspend()
        try:
            frozen_at, slowest_s = time.monotonic(), 0.0
            while time.monotonic() - frozen_at < 2.0:
                asked_at = time.monotonic()
                assert [w.state for w in cluster.view().workers] == ["ready"] * 4
                slowest_s = max(slowest_s, time.monotonic() - asked_at)
        finally:
            controller.resume()
        assert slowest_s < 0.2
        victim = cluster.view().workers[0]
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: cluster.view().workers[0].state == "lost", 5.0)
        monkeypatch.undo()


def listens(process: psutil.Process) -> set[tuple[str, str]]:
    """(its name, the address) of every port it listens at."""
    try:
        found = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return {(process.name(), c.laddr.ip.removeprefix("::ffff:")) for c in found}
    except psutil.NoSuchProcess:  # Ray ends idle ones
        return set()


@pytest.mark.ray
def test_a_ray_of_our_own_listens_on_loopback_alone(ray_session: None) -> None:
    def everything() -> set[tuple[str, str]]:
        return set().union(*map(listens, [psutil.Process(), *psutil.Process().children(recursive=True)]))

    eventually(lambda: any("Agent" in name for name, _ in everything()), 30.0)
    assert "raylet" in {name for name, _ in everything()}
    assert {ip for _, ip in everything()} == {"127.0.0.1"}, sorted(everything())


@pytest.mark.ray
def test_a_ray_of_our_own_answers_only_who_has_its_token(ray_session: None) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    ray = pytest.importorskip("ray")
    address = ray.get_runtime_context().gcs_address
    stranger = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    command = [sys.executable, "-c", f"import ray; ray.init(address={address!r})"]
    done = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "token" in done.stderr.lower()
