"""A Ray of our own that does not come up is swept away and started once more."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray
pytest.importorskip("afd.cluster.ray_core")

# Ray's own wait for its first process, cut to nothing: the try fails, and leaves that process behind.
IMPATIENT = "RAY_gcs_server_port_wait_time_s"
PROGRAM = f"""
import os, psutil, sys
from afd.cluster import ray_session
from afd.config import Deployment

impatient = int(sys.argv[1])
begin = ray_session._start

def start(deployment, folder):
    global impatient
    impatient -= 1
    os.environ["{IMPATIENT}"] = "0" if impatient >= 0 else "60"
    begin(deployment, folder)

ray_session._start = start
try:
    with ray_session.session(Deployment()):
        print(sum("gcs_server" in process.name() for process in psutil.Process().children(recursive=True)), "running")
except ray_session.ClusterError as error:
    print(len(psutil.Process().children()), "left:", error)
"""


def run(impatient: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(impatient)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_first_try_that_fails_is_swept_away_and_made_again() -> None:
    done = run(impatient=1)
    assert done.stdout.strip() == "1 running"
    assert "is started again" in done.stderr


def test_a_second_failure_is_one_sentence_and_leaves_no_process() -> None:
    assert run(impatient=2).stdout.startswith("0 left: Ray cannot start: ")
