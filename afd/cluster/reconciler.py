"""READ FIRST. Keeps a cluster that once served serving: who is lost is killed, started again, and met by the others.

    WAITING ─► STARTING ─► (attention: LOADED ─► CONNECTING ─►) SERVING
       ▲                            │ any of them: gone, silent for cluster.silent_s, or of no more use
       └────────────────────────────┴─► GIVEN_UP, after cluster.restarts within cluster.restart_window_s

The controller's thread calls `turn` a few times a second, and when something happened; a turn looks at every worker
once, never waits for one (killing aside), and compares what is with what should be. So it may miss any number of
turns, and a turn's failure is mended by the next.

A worker is of no more use when it says so (an engine that gave up, a loop that ended), or when an attention worker
says that it did not answer in time (transport.deadline_s) or sent what it must not. One whose link merely broke is
connected again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from afd.cluster.host import Handle
from afd.cluster.placement import Seat
from afd.cluster.standby import Standbys
from afd.cluster.worker import Phase, Worker
from afd.config import Deployment
from afd.errors import AfdError
from afd.types import FfnAddress, Role

log = logging.getLogger(__name__)

STARTING_S = 30.0  # loading keeps a worker from answering: at least this much silence until it serves
RETRY_S = 0.5  # between two tries to connect an attention worker


class Reconciler:
    """`spawn` starts a worker for a seat and raises ClusterError when the cluster is being stopped; `wake` makes the
    next turn come at once, and may be called by any thread."""

    def __init__(
        self,
        deployment: Deployment,
        workers: Mapping[Seat, Worker],
        spawn: Callable[[Seat], Handle],
        standbys: Standbys,
        wake: Callable[[], None],
    ) -> None:
        self._settings = deployment.cluster
        self._workers = tuple(workers.values())
        self._ffn = [w for w in self._workers if w.seat.role is Role.FFN]
        self._spawn = spawn
        self._standbys = standbys
        self._wake = wake

    def turn(self, now_s: float) -> None:
        """Looks at every worker once; `now_s` of one monotonic clock. Raises ClusterError when the cluster is being
        stopped."""
        for worker in self._workers:
            if worker.phase is Phase.WAITING:
                if now_s >= worker.since_s:
                    self._start(worker, now_s)
            elif worker.phase is not Phase.GIVEN_UP and self._lives(worker, now_s):
                self._advance(worker, now_s)
        self._standbys.refill(now_s)

    # ---- what is ------------------------------------------------------------------------------------------------

    def _lives(self, worker: Worker, now_s: float) -> bool:
        """Takes in what the worker says of itself, and ends it if it is of no more use."""
        assert worker.probe is not None, f"{worker.name} was never started"
        try:
            status = worker.probe.look(now_s)
        except AfdError as error:
            return self._lose(worker, str(error), now_s)
        silent_s, patience_s = worker.probe.silent_s, self._settings.silent_s
        if worker.phase is not Phase.SERVING:
            patience_s = max(patience_s, STARTING_S)
        placed = worker.handle is not None and worker.handle.pid  # Ray may be looking for room still: cluster.start_s
        if placed and silent_s > patience_s:
            return self._lose(worker, f"{worker.name} has not answered for {silent_s:.1f} s (cluster.silent_s)", now_s)
        if status is None or worker.phase is not Phase.SERVING:
            return True
        if status["state"] == "lost":
            return self._lose(worker, status["message"], now_s)
        worker.says(status)
        for address, why in status.get("ffn_suspects", {}).items():
            self._suspect(address, f"{why}, says {worker.name}", now_s)
        return True

    def _suspect(self, address: FfnAddress, why: str, now_s: float) -> None:
        """An attention worker gave up on the FFN worker at `address`, which may have been replaced since."""
        for ffn in self._ffn:
            if ffn.phase is Phase.SERVING and ffn.ffn_address == address:
                self._lose(ffn, why, now_s)

    def _lose(self, worker: Worker, why: str, now_s: float) -> bool:
        """Ends a life, and decides whether there will be another; False."""
        assert worker.handle is not None, f"{worker.name} was never started"
        worker.handle.kill()
        delay_s = worker.restarts.delay_s(now_s)
        if delay_s is None:
            why = f"{why}; {worker.restarts.verdict()}"
            worker.does(Phase.GIVEN_UP, None, now_s)
            worker.view = replace(worker.view, state="lost", message=why)
        else:
            why = f"{why}; it is started again"
            worker.does(Phase.WAITING, None, now_s + delay_s)
            worker.view = replace(worker.view, state="starting", message=why)
            self._wake()
        log.error("%s", why)
        return False

    # ---- what should be -----------------------------------------------------------------------------------------

    def _start(self, worker: Worker, now_s: float) -> None:
        handle = self._standbys.take() if worker.seat.role is Role.FFN else None
        if handle is not None:
            log.info("%s takes the place of %s", handle.name, worker.name)
            handle.name = worker.name
            call = handle.submit("start", worker.seat.rank)
        else:
            handle = self._spawn(worker.seat)
            call = handle.submit("start")
        worker.begins(handle, self._waking(call), now_s, self._wake)

    def _advance(self, worker: Worker, now_s: float) -> None:
        """The next step of a worker that lives, if it is time for one."""
        if worker.phase is Phase.STARTING:
            self._follow_start(worker, now_s)
        elif worker.phase is Phase.CONNECTING:
            self._follow_connect(worker, now_s)
        elif worker.phase is Phase.SERVING and worker.seat.role is Role.ATTENTION:
            self._reconnect(worker, now_s)
        if worker.phase is Phase.LOADED and now_s >= worker.since_s and self._every_rank_serves():
            call = self._ask(worker, "connect", self._addresses())
            worker.does(Phase.CONNECTING, call, now_s)

    def _follow_start(self, worker: Worker, now_s: float) -> None:
        assert worker.call is not None, f"{worker.name} starts without a call"
        if not worker.call.done():
            if now_s > worker.since_s + self._settings.start_s:
                limit = f"{self._settings.start_s:g} s (cluster.start_s)"
                self._lose(worker, f"{worker.name} did not start within {limit}", now_s)
        elif error := worker.call.exception():
            self._lose(worker, str(error), now_s)
        else:
            worker.started(worker.call.result())
            worker.since_s = now_s
            self._wake()

    def _follow_connect(self, worker: Worker, now_s: float) -> None:
        """An FFN worker may have gone meanwhile: then it is tried again, with those that serve by then."""
        assert worker.call is not None, f"{worker.name} connects without a call"
        if not worker.call.done():
            return
        if error := worker.call.exception():
            log.warning("%s is not connected yet: %s", worker.name, error)
            worker.does(Phase.LOADED, None, now_s + RETRY_S)
        else:
            worker.call = None
            worker.serves()

    def _reconnect(self, worker: Worker, now_s: float) -> None:
        """Lets an attention worker meet the FFN workers that it has no link to."""
        if worker.call is not None:
            if not worker.call.done():
                return
            if error := worker.call.exception():
                log.warning("%s does not reach all FFN workers: %s", worker.name, error)
                worker.since_s = now_s + RETRY_S
            worker.call = None
        strangers = [address for address in self._addresses() if address not in worker.living]
        if strangers and now_s >= worker.since_s:
            worker.call = self._ask(worker, "reconnect", strangers)

    def _ask(self, worker: Worker, method: str, ffn: list[FfnAddress]) -> Future[Any]:
        assert worker.handle is not None, f"{worker.name} was never started"
        return self._waking(worker.handle.submit(method, ffn, self._settings.silent_s))

    def _waking(self, call: Future[Any]) -> Future[Any]:
        call.add_done_callback(lambda _: self._wake())
        return call

    def _addresses(self) -> list[FfnAddress]:
        """Of every FFN worker that serves."""
        return [ffn.ffn_address for ffn in self._ffn if ffn.phase is Phase.SERVING and ffn.ffn_address is not None]

    def _every_rank_serves(self) -> bool:
        return {address.ffn_rank for address in self._addresses()} == {ffn.seat.rank for ffn in self._ffn}
