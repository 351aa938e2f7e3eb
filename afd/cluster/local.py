"""Workers as plain processes of this machine, without Ray: for tests, and for machines that have only torch."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from afd import env
from afd.cluster.controller import Controller, new_epoch
from afd.cluster.host import Handle, Host, exit_message, failed, settle, this_node
from afd.cluster.inproc import ThreadHost
from afd.cluster.roles import Roles
from afd.config import Deployment, Resources
from afd.credentials import Credentials, for_run
from afd.errors import ClusterError

EXIT_S = 5.0  # a process whose socket closed has this long to end by itself


class ProcessHandle(Handle):
    """A worker process and the socket to it. One reader thread settles calls and sees the process end."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.name = name
        self.pid = process.pid
        self.node = this_node()
        self._process = process
        self._connection = connection
        self._ids = itertools.count()
        self._open: dict[int, Future[Any]] = {}
        self._gone = ""  # how it ended, once it did
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"reads {name}", daemon=True)
        self._reader.start()

    def submit(self, method: str, *args: object) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._gone:
                return failed(ClusterError(self._gone))
            call_id = next(self._ids)
            self._open[call_id] = future
            with suppress(OSError):  # it is dying: the reader says how, and fails this call with the others
                self._connection.send((call_id, method, args))
        return future

    def kill(self) -> None:
        self._process.kill()
        self._reader.join(EXIT_S)

    def _read(self) -> None:
        while True:
            try:
                call_id, outcome = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._open.pop(call_id)
            settle(future, outcome)
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        with self._lock:
            self._gone = exit_message(self.name, self.pid, code)
            calls = list(self._open.values())
            self._connection.close()
        for future in calls:
            settle(future, (None, ClusterError(self._gone)))


class ProcessHost(Host):
    """Starts workers as processes, each in a session of its own so that Ctrl-C reaches only the parent."""

    def __init__(self) -> None:
        # The kernel kills a child when the *thread* that forked it ends (PR_SET_PDEATHSIG), so one thread that lives
        # as long as the host does all the forking.
        self._forker = ThreadPoolExecutor(1, "forks workers")

    def spawn(self, name: str, role: str, args: tuple[object, ...], resources: Resources) -> Handle:  # noqa: ARG002
        return self._forker.submit(_fork, name, role, args).result()

    def close(self) -> None:
        self._forker.shutdown()


def _fork(name: str, role: str, args: tuple[object, ...]) -> Handle:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "afd.cluster.child", str(theirs.fileno()), str(os.getpid())]
        try:
            process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is the command's own; workers have only a log
                start_new_session=True,
                env={**env.for_children(), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        except OSError as error:
            ours.close()
            raise ClusterError(f"{name}: a process cannot be started: {error.strerror}") from error
    connection = Connection(ours.detach())
    connection.send((sys.path, name, role, args))
    return ProcessHandle(name, process, connection)


@contextmanager
def cluster(
    deployment: Deployment,
    roles: Roles = Roles(),  # noqa: B008
    credentials: Credentials | None = None,
) -> Iterator[Controller]:
    """A running cluster without Ray: processes, or threads of this one when transport.kind is inproc.

    Yields at once; `wait_ready` says when it can serve. On the way out every worker is stopped, whatever happened.
    `credentials` None: with a token of its own.
    """
    host = ThreadHost() if deployment.transport.kind == "inproc" else ProcessHost()
    controller = Controller(deployment, host, roles, new_epoch(), credentials or for_run(deployment))
    try:
        controller.begin()
        yield controller
    finally:
        controller.stop(0.0)
        host.close()
