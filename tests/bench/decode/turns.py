"""One candidate runs at a time; the processes of all others are stopped, so that waiting costs no CPU."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from tests.bench.decode.workload import Candidate


@contextmanager
def waiting(candidate: Candidate) -> Iterator[None]:
    """From now on the candidate's processes run in its turns only; they run again when the block ends, however it does,
    so that they can be told to end."""
    try:
        _stop(candidate)
        yield
    finally:
        _signal(candidate, signal.SIGCONT)


@contextmanager
def turn(candidate: Candidate) -> Iterator[None]:
    """Lets a waiting candidate run."""
    _signal(candidate, signal.SIGCONT)
    try:
        yield
    finally:
        _stop(candidate)


def _stop(candidate: Candidate) -> None:
    """The whole tree; until no process is left that was born while its parent was being stopped."""
    stopped: set[int] = set()
    while new := {process.pid for process in _tree(candidate)} - stopped:
        _signal(candidate, signal.SIGSTOP)
        stopped |= new


def _signal(candidate: Candidate, number: signal.Signals) -> None:
    for process in _tree(candidate):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _tree(candidate: Candidate) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for pid in candidate.pids():
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found += [root, *root.children(recursive=True)]
    return found
