"""The program of a worker process: `python -m afd.cluster.child FD PARENT_PID`, started by afd.cluster.local.

FD is a socket to the parent. The parent's first message is (sys.path, name, role, args), all others are calls
(call_id, method, args), answered by (call_id, outcome). The process ends when the socket does, so no worker outlives
its parent, however that died.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import NoReturn

from afd import log
from afd.cluster.servant import Servant
from afd.errors import ClusterError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CALLS_AT_ONCE = 4  # start or stop may take long; status must get through meanwhile


def main() -> None:
    """Serves calls until the parent goes."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        path, name, role, args = connection.recv()
        sys.path[:] = path
        log.setup(name)
        _serve(connection, Servant(name, role, args))
    except (EOFError, OSError):
        os._exit(0)  # not sys.exit: threads of a role that nobody stopped must not keep the process
    except BaseException:
        logging.getLogger(__name__).exception("the worker process failed")
        os._exit(1)


def _serve(connection: Connection, servant: Servant) -> NoReturn:
    sending = threading.Lock()

    def answer(call_id: int, method: str, args: tuple[object, ...]) -> None:
        outcome = servant.call(method, args)
        try:
            with sending:
                connection.send((call_id, outcome))
        except OSError:
            pass  # the parent is gone: the loop below sees it too
        except Exception as error:
            refusal = ClusterError(f"the answer of {servant.name} to {method} cannot be sent: {error}")
            with sending:
                connection.send((call_id, (None, refusal)))

    pool = ThreadPoolExecutor(CALLS_AT_ONCE)  # never waited for: a call that hangs must not keep the process
    while True:
        pool.submit(answer, *connection.recv())


def _die_with(parent: int) -> None:
    """Lets the kernel kill this process with its parent; the socket's end would come too late to one stuck in C."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    main()
