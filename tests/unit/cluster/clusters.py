"""Clusters of toys, and waiting for what happens to them."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from afd.cluster.controller import Cluster
from afd.cluster.roles import Roles
from afd.config import Deployment

TOYS = Roles(attention="tests.unit.cluster.toys:ToyAttention", ffn="tests.unit.cluster.toys:ToyFfn")
OpenCluster = Callable[[Deployment], AbstractContextManager[Cluster]]


def eventually(what: Callable[[], object], timeout_s: float) -> float:
    """Seconds until `what` is true."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        threading.Event().wait(0.01)
    return time.monotonic() - began


def is_gone(pid: int, timeout_s: float) -> bool:
    """Whether process `pid` ends within `timeout_s` seconds; a zombie has ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], timeout_s)[0])
    finally:
        os.close(watched)
