"""Ends an actor's process from outside: one that is frozen does not hear Ray's word."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from afd.cluster.ray_core import NodeAffinitySchedulingStrategy, RayError, ray

log = logging.getLogger(__name__)

REACH_S = 5.0  # for another node to carry it out


def end_process(pid: int, node_id: str) -> None:
    """SIGKILL for the actor in process `pid` on `node_id`; by a task there where that is not this node. Returns when
    it is done, or cannot be (which is logged)."""
    if not pid:
        return
    if node_id == ray.get_runtime_context().get_node_id():
        _end(pid)
        return
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(_end).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    try:
        ray.get(task.remote(pid), timeout=REACH_S)
    except (RayError, TimeoutError) as error:
        log.warning("process %d on Ray's node %s may be left behind: %s", pid, node_id, " ".join(str(error).split()))


def _end(pid: int) -> None:
    with suppress(OSError):  # it is gone, and its number may be somebody else's
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
