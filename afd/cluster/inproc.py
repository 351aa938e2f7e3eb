"""Workers as threads of this process: the whole cluster under one debugger. Goes with the inproc transport."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from typing import Any

from afd.cluster.host import Handle, Host, failed, settle, this_node
from afd.cluster.servant import Servant
from afd.config import Resources
from afd.errors import ClusterError


class ThreadHandle(Handle):
    """A role object in this process. Nothing can kill it: `kill` asks it to stop, and listens no more."""

    def __init__(self, name: str, role: str, args: tuple[object, ...]) -> None:
        self.name = name
        self.pid = os.getpid()
        self.node = this_node()
        self._servant = Servant(name, role, args)
        self._open: set[Future[Any]] = set()
        self._gone = False
        self._stopping = False
        self._lock = threading.Lock()

    def submit(self, method: str, *args: object) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._gone:
                return failed(ClusterError(f"{self.name} was stopped"))
            self._open.add(future)
            self._stopping = self._stopping or method == "stop"
        # A daemon thread per call: one that hangs must not keep the process from ending.
        threading.Thread(
            target=self._run, args=(future, method, args), name=f"{self.name} {method}", daemon=True
        ).start()
        return future

    def kill(self) -> None:
        with self._lock:
            self._gone = True
            calls, self._open = self._open, set()
            lives = self._servant.built and not self._stopping
            self._stopping = True
        if lives:
            threading.Thread(
                target=self._servant.call, args=("stop", ()), name=f"{self.name} stop", daemon=True
            ).start()
        for future in calls:
            settle(future, (None, ClusterError(f"{self.name} was stopped")))

    def _run(self, future: Future[Any], method: str, args: tuple[object, ...]) -> None:
        outcome = self._servant.call(method, args)
        with self._lock:
            if future not in self._open:
                return
            self._open.discard(future)
        settle(future, outcome)


class ThreadHost(Host):
    """Starts workers as threads of this process."""

    def spawn(self, name: str, role: str, args: tuple[object, ...], resources: Resources) -> Handle:  # noqa: ARG002
        return ThreadHandle(name, role, args)

    def close(self) -> None:
        pass
