"""Where workers run: the interface that the controller drives, whatever is underneath.

    Host    something that can start workers: threads (afd.cluster.inproc), processes (afd.cluster.local), Ray actors
            (afd.cluster.ray_host)
    Handle  one worker that was started

A call on a worker is a future. It ends with what the method returned, with the AfdError it raised, or, when the worker
is gone, with a ClusterError that says how it went; so a dead worker is noticed by asking it anything.
"""

from __future__ import annotations

import signal
import socket
from abc import ABC, abstractmethod
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from afd.cluster.servant import Outcome
from afd.config import Resources
from afd.errors import AfdError, ClusterError


class Handle(ABC):
    """One worker. Every method may be called from any thread. `pid` and `node` are 0 and "" until known."""

    name: str  # for messages, e.g. "ffn_rank 1"
    pid: int = 0
    node: str = ""

    @abstractmethod
    def submit(self, method: str, *args: object) -> Future[Any]:
        """Calls `method` on the role. Returns at once; calls may overlap and end in any order."""

    @abstractmethod
    def kill(self) -> None:
        """Ends the worker now and fails its open calls with ClusterError. Returns when it is gone. Idempotent."""

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """`submit` and wait. Raises what the future does, and ClusterError after `timeout_s` seconds."""
        try:
            return self.submit(method, *args).result(timeout_s)
        except FutureTimeout as error:
            raise ClusterError(f"{self.name} did not answer {method} within {timeout_s:g} s") from error


class Host(ABC):
    """Something that can start workers."""

    @abstractmethod
    def spawn(self, name: str, role: str, args: tuple[object, ...], resources: Resources) -> Handle:
        """Starts a worker that will build `role` ("module:Class") from `args` at its first call. Does not wait for it.
        Raises ClusterError when not even that can be begun."""

    def workers_on_host(self, workers: int) -> int:
        """How many of `workers` share one machine's cores: a guess, and right where there is one machine."""
        return workers

    def survivors(self) -> list[tuple[str, Handle]]:
        """Workers of this run that an earlier controller has left, with the names they were spawned by."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Gives up what the host itself holds; its workers are gone by then. Idempotent."""


def settle(future: Future[Any], outcome: Outcome) -> None:
    """Ends `future` with what a Servant answered; does nothing if it ended already."""
    value, error = outcome
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def failed(error: AfdError) -> Future[Any]:
    """A call that ended before it began."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def exit_message(name: str, pid: int, code: int) -> str:
    """One sentence on how a process ended; `code` as in subprocess.Popen.returncode."""
    if code >= 0:
        return f"{name} (pid {pid}) exited with code {code}"
    hint = ", killed by somebody or for want of memory" if -code == signal.SIGKILL else ""
    return f"{name} (pid {pid}) exited with signal {-code}{hint}"


def this_node() -> str:
    """The name of this machine."""
    return socket.gethostname()
