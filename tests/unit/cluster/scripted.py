"""A worker that does as the test tells it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from afd.cluster.host import Handle, failed
from afd.cluster.placement import Seat
from afd.errors import ClusterError
from afd.types import FfnAddress


class Scripted(Handle):
    """A worker whose every call stays open until the test ends it; `status` is answered at once with `says`."""

    lives = 0

    def __init__(self, name: str) -> None:
        Scripted.lives += 1
        self.name, self.life, self.pid = name, Scripted.lives, 7
        self.calls: list[tuple[str, tuple[object, ...], Future[Any]]] = []
        self.says: dict[str, Any] | None = {"state": "ready", "message": ""}  # None: it hangs
        self.gone = ""
        self.killed = False

    def submit(self, method: str, *args: object) -> Future[Any]:
        if self.gone:
            return failed(ClusterError(self.gone))
        future: Future[Any] = Future()
        if method == "status":
            if self.says is not None:
                future.set_result(dict(self.says))
        else:
            self.calls.append((method, args, future))
        return future

    def kill(self) -> None:
        self.killed = True

    def ends(self, method: str, result: object = None) -> None:
        """The open call of this name ends with `result`, or raises it."""
        future = next(future for name, _, future in self.calls if name == method and not future.done())
        future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    @property
    def asked(self) -> list[str]:
        return [name for name, _, _ in self.calls]


def address(handle: Scripted, seat: Seat) -> FfnAddress:
    return FfnAddress(seat.rank, inproc=f"life {handle.life}")
