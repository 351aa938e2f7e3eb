"""gRPC with the polling that suits two workers. Whoever imports it from here first decides for the whole process.

The C core's own polling threads hand every event on to the thread that waits for it. The older way, in which that
thread polls, takes a third less CPU time a frame. The core reads its experiments from the environment while the
package is imported; child processes, Ray's own among them, inherit nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["grpc"]

_NAME = "GRPC_EXPERIMENTS"


@contextmanager
def _experiments(wanted: str) -> Iterator[None]:
    """Asks for these; a user's own choice counts for more."""
    if _NAME in os.environ:
        yield
        return
    os.environ[_NAME] = wanted
    try:
        yield
    finally:
        del os.environ[_NAME]


with _experiments("-event_engine_client,-event_engine_listener"):
    import grpc
