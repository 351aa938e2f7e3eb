"""No worker process outlives the process that started it, however that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.unit.cluster.clusters import is_gone

PARENT = """
import sys, threading
from afd.cluster.local import cluster
from afd.config import Deployment
from tests.unit.cluster.clusters import TOYS

deployment = Deployment().with_flags({"topology": "1A2F"})
with cluster(deployment, TOYS) as running:
    assert running.wait_ready(60)
    print(*[w.pid for w in running.view().workers], flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_killed(number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.send_signal(number)
        assert all(is_gone(pid, 5.0) for pid in pids)


def test_workers_end_with_a_parent_that_just_leaves() -> None:
    """os._exit runs no cleanup of ours: only the kernel tells the workers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = PARENT.replace("sys.stdin.read()", "import os; os._exit(0)")
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    assert all(is_gone(pid, 5.0) for pid in pids)
