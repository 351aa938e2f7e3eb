"""Every kind of host keeps the same promises about calls and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import wait
from contextlib import closing
from multiprocessing.connection import Connection

import pytest

from afd.cluster.host import Handle, Host
from afd.config import Resources
from afd.errors import CheckpointError, ClusterError, PeerLost
from tests.unit.cluster.clusters import eventually

NOTHING = Resources(num_cpus=0)
TOYS = "tests.unit.cluster.toys"
TIMEOUT_S = 30.0


def spawn(host: Host, greeting: str = "hello") -> Handle:
    return host.spawn("ffn_rank 3", f"{TOYS}:Oddities", (greeting,), NOTHING)


def test_a_call_returns_what_the_method_returned(host: Host) -> None:
    handle = spawn(host)
    assert handle.call("greet", "world", timeout_s=TIMEOUT_S) == "hello, world"
    handle.kill()


def test_an_error_of_ours_comes_back_as_its_class_with_its_sentence(host: Host) -> None:
    handle = spawn(host)
    with pytest.raises(PeerLost, match=r"^ffn_rank 1 is gone$") as caught:
        handle.call("raise_ours", timeout_s=TIMEOUT_S)
    assert caught.value.peer == "ffn_rank 1"
    handle.kill()


def test_any_other_error_comes_back_as_one_sentence_and_the_worker_goes_on(host: Host) -> None:
    handle = spawn(host)
    with pytest.raises(ClusterError, match=r"^ffn_rank 3 failed in raise_foreign: ZeroDivisionError: a bug$"):
        handle.call("raise_foreign", timeout_s=TIMEOUT_S)
    assert handle.call("greet", "again", timeout_s=TIMEOUT_S) == "hello, again"
    handle.kill()


def test_a_role_that_cannot_be_built_or_imported_fails_its_first_call(host: Host) -> None:
    unbuildable, unknown = (
        spawn(host, "unbuildable"),
        host.spawn("ffn_rank 4", f"{TOYS}:Nobody", (), NOTHING),
    )
    with pytest.raises(CheckpointError, match=r"^no such greeting$"):
        unbuildable.call("greet", "world", timeout_s=TIMEOUT_S)
    with pytest.raises(ClusterError, match=r"AttributeError: .*Nobody"):
        unknown.call("start", timeout_s=TIMEOUT_S)
    unbuildable.kill()
    unknown.kill()


def test_calls_overlap_so_that_a_long_one_does_not_hide_a_worker(host: Host) -> None:
    handle = spawn(host)
    waiting = handle.submit("wait")
    assert handle.call("greet", "meanwhile", timeout_s=TIMEOUT_S) == "hello, meanwhile"
    handle.call("release", timeout_s=TIMEOUT_S)
    assert waiting.result(TIMEOUT_S) == "released"
    handle.kill()


def test_a_call_past_its_deadline_names_worker_method_and_limit(host: Host) -> None:
    handle = spawn(host)
    handle.call("greet", "world", timeout_s=TIMEOUT_S)
    with pytest.raises(ClusterError, match=r"^ffn_rank 3 did not answer wait within 0.05 s$"):
        handle.call("wait", timeout_s=0.05)
    handle.kill()


def test_killing_fails_open_calls_and_later_ones(host: Host) -> None:
    handle = spawn(host)
    handle.call("greet", "world", timeout_s=TIMEOUT_S)
    waiting = handle.submit("wait")
    handle.kill()
    assert isinstance(waiting.exception(TIMEOUT_S), ClusterError)
    with pytest.raises(ClusterError, match=r"ffn_rank 3"):
        handle.call("greet", "world", timeout_s=TIMEOUT_S)
    handle.kill()


@pytest.mark.parametrize("host", ["processes", pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_a_process_killed_from_outside_fails_its_open_calls_at_once(host: Host) -> None:
    handle = spawn(host)
    pid = handle.call("pid", timeout_s=TIMEOUT_S)
    assert pid != os.getpid()
    # Ray tells a handle where its actor runs in a message of its own, which may come after an answer.
    eventually(lambda: handle.pid == pid, TIMEOUT_S)
    waiting = handle.submit("wait")
    os.kill(pid, signal.SIGKILL)
    assert wait([waiting], 5.0).done
    with pytest.raises(ClusterError, match=rf"^ffn_rank 3 \(pid {pid}.*\) exited"):
        waiting.result()
    handle.kill()


@pytest.mark.parametrize("host", ["processes"], indirect=True)
def test_an_answer_that_cannot_be_sent_is_an_error_of_that_call(host: Host) -> None:
    handle = spawn(host)
    with pytest.raises(ClusterError, match=r"^the answer of ffn_rank 3 to return_lock cannot be sent"):
        handle.call("return_lock", timeout_s=TIMEOUT_S)
    assert handle.call("greet", "again", timeout_s=TIMEOUT_S) == "hello, again"
    handle.kill()


def test_a_worker_process_that_fails_outside_every_call_says_so_and_exits_with_1() -> None:
    ours, theirs = socket.socketpair()
    with theirs, closing(Connection(ours.detach())) as connection:
        connection.send("not what a parent says")
        child = subprocess.run(
            [sys.executable, "-m", "afd.cluster.child", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert child.returncode == 1
    assert "the worker process failed" in child.stderr
    assert "ValueError" in child.stderr


@pytest.mark.parametrize("host", ["threads"], indirect=True)
def test_a_killed_thread_is_asked_to_stop(host: Host) -> None:
    handle = spawn(host)
    handle.call("greet", "world", timeout_s=TIMEOUT_S)
    role = handle._servant._role  # type: ignore[attr-defined]
    handle.kill()
    assert role.opened.wait(TIMEOUT_S)
