"""Processes that wait to take a lost FFN worker's place: Python, torch and the model's plan are loaded, weights not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from afd.cluster.host import Handle
from afd.cluster.probe import Probe
from afd.cluster.restarts import Restarts
from afd.errors import AfdError, ClusterError

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Standby:
    handle: Handle
    prepared: Future[Any]
    probe: Probe


class Standbys:
    """Keeps `count` of them. `spawn` starts one by its name; `silent_s` as in cluster.silent_s, for those that are
    prepared. Belongs to the controller's thread; `handles` may be read by any."""

    def __init__(self, count: int, spawn: Callable[[str], Handle], restarts: Restarts, silent_s: float) -> None:
        self._count = count
        self._spawn = spawn
        self._restarts = restarts
        self._silent_s = silent_s
        self._standbys: list[_Standby] = []
        self._due_s = 0.0

    @property
    def handles(self) -> list[Handle]:
        return [standby.handle for standby in tuple(self._standbys)]

    def refill(self, now_s: float) -> None:
        """Lets go of those that died or hang, and starts others in the place of them and of those taken."""
        for standby in tuple(self._standbys):
            try:
                standby.probe.look(now_s)
                if standby.prepared.done():
                    standby.prepared.result()
                    if standby.probe.silent_s > self._silent_s:
                        raise ClusterError(f"{standby.handle.name} has said nothing for {self._silent_s:g} s")
            except AfdError as error:
                self._drop(standby, str(error), now_s)
        while len(self._standbys) < self._count and now_s >= self._due_s:
            handle = self._spawn(f"ffn standby {len(self._standbys)}")
            self._standbys.append(_Standby(handle, handle.submit("prepare"), Probe(handle)))

    def take(self) -> Handle | None:
        """One that is prepared, to be told its rank; None when there is none."""
        for standby in self._standbys:
            if standby.prepared.done() and standby.prepared.exception() is None:
                self._standbys.remove(standby)
                return standby.handle
        return None

    def _drop(self, standby: _Standby, why: str, now_s: float) -> None:
        self._standbys.remove(standby)
        standby.handle.kill()
        delay_s = self._restarts.delay_s(now_s)
        if delay_s is None:
            log.error("%s; %s", why, self._restarts.verdict())
            self._count = len(self._standbys)
        else:
            log.warning("%s; another is started", why)
            self._due_s = now_s + delay_s
