"""Starts the workers a deployment wants, connects them, and keeps them serving: one class for every kind of host.

One thread does it all, in the order of `_run`: start all that is wanted, connect, and then reconcile
(afd.cluster.reconciler) until the end. Until every worker has served once, a failure ends the whole cluster with one
sentence; from then on whoever is lost is started again.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol

from afd.cluster.host import Handle, Host
from afd.cluster.placement import Seat, resources_of, wanted
from afd.cluster.reconciler import Reconciler
from afd.cluster.restarts import Restarts
from afd.cluster.resume import resume
from afd.cluster.roles import Roles
from afd.cluster.standby import Standbys
from afd.cluster.timelines import collect
from afd.cluster.worker import Phase, Worker
from afd.config import Deployment
from afd.credentials import OPEN, Credentials
from afd.errors import AfdError, ClusterError
from afd.pipeline.timeline import Timelines
from afd.types import ClusterView, Role

log = logging.getLogger(__name__)

POLL_S = 0.25  # how often each worker is asked; a death is known after at most one
CONNECT_MARGIN_S = 10.0  # a worker's own transport.connect_s runs out first and has the better sentence
STOP_MARGIN_S = 1.5  # for a worker to end after draining, before it is killed
SETTLE_S = 8.0  # for a controller that takes over to find its workers, before somebody who asks for them is told off
END_S = 5.0  # for the controller's own thread to end once no worker lives
STARTED = (Phase.LOADED, Phase.CONNECTING, Phase.SERVING)


class Cluster(Protocol):
    """A cluster as its user sees it. Every method may be called from any thread."""

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether all workers serve, waiting at most `timeout_s` seconds. Raises what kept the cluster from
        starting; everything that had started is stopped by then."""

    def view(self) -> ClusterView:
        """Every worker's state now."""

    def timelines(self, seconds: float, max_events: int) -> Timelines:
        """The last `seconds` of every worker's timeline, at most `max_events` events over all of them. Takes as long
        as the slowest worker does to answer, and at most afd.cluster.timelines.ANSWER_S seconds."""

    def stop(self, drain_s: float) -> None:
        """Stops all workers: requests get `drain_s` seconds to finish, then what still runs is killed. Idempotent."""


class Controller:
    """Reconciles the workers that the deployment wants with those that live.

    `host` starts them; `epoch` names this run, and no frame of another one is accepted; `credentials` are handed to
    every worker. See `Cluster` for the methods.
    """

    def __init__(
        self, deployment: Deployment, host: Host, roles: Roles, epoch: int, credentials: Credentials = OPEN
    ) -> None:
        self._deployment = deployment
        self._host = host
        self._roles = roles
        self._epoch = epoch
        self._credentials = credentials
        settings = deployment.cluster
        self._workers = {seat: Worker.at(seat, self._restarts()) for seat in wanted(deployment)}
        self._standbys = Standbys(settings.standby_ffn, self._spawn_standby, self._restarts(), settings.silent_s)
        self._ready: Future[None] = Future()
        self._stopping = threading.Event()
        self._settled = threading.Event()  # it is known who was there before
        self._changed = threading.Event()  # look at the workers now
        self._membership = threading.Lock()
        self._noting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def begin(self) -> None:
        """Starts the controller's thread; call once."""
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """See Cluster."""
        try:
            self._ready.result(timeout_s)
        except FutureTimeout:
            return False
        return True

    def view(self) -> ClusterView:
        """See Cluster. Raises ClusterError of a controller that does not know yet whom another has left."""
        if not self._settled.wait(SETTLE_S):
            raise ClusterError(f"the controller has not found its workers within {SETTLE_S:g} s")
        views = tuple(worker.shown() for worker in self._workers.values())
        return ClusterView(self._epoch, self._deployment.model, self._deployment.topology, views)

    def deployment(self) -> Deployment:
        """What this run was started with."""
        return self._deployment

    def credentials(self) -> Credentials:
        """What its workers ask for. Who may ask here may read them in Ray's control service as well."""
        return self._credentials

    def timelines(self, seconds: float, max_events: int) -> Timelines:
        """See Cluster."""
        serving = [w.handle for w in self._workers.values() if w.phase is Phase.SERVING and w.handle is not None]
        return collect(serving, seconds, max_events)

    def stop(self, drain_s: float) -> None:
        """See Cluster."""
        self._stopping.set()
        self._changed.set()
        self._end_workers(drain_s)
        if self._thread.is_alive():
            self._thread.join(END_S)
            if self._thread.is_alive():
                log.warning("the controller's thread did not end within %g s of its workers; it is left behind", END_S)
        self._kill_all()  # and whom it was just about to seat

    def _run(self) -> None:
        try:
            try:
                resumed = resume(self._workers, self._host.survivors(), self._deployment.cluster.silent_s)
            finally:
                self._settled.set()
            if not resumed:
                self._start_all()
                self._connect()
        except AfdError as error:
            self._give_up(error)
            return
        except Exception as error:
            log.exception("the controller failed")
            self._give_up(ClusterError(f"the controller failed: {type(error).__name__}: {error}"))
            return
        self._ready.set_result(None)
        self._reconcile()

    def _reconcile(self) -> None:
        """Until the end. A turn that fails by a bug is told, and followed by the next."""
        reconciler = Reconciler(self._deployment, self._workers, self._spawn, self._standbys, self._changed.set)
        while not self._stopping.is_set():
            self._changed.wait(POLL_S)
            self._changed.clear()
            try:
                reconciler.turn(time.monotonic())
            except AfdError as error:
                if not self._stopping.is_set():
                    log.error("%s", error)
            except Exception:
                log.exception("the controller failed in a turn")

    def _start_all(self) -> None:
        """Starts every worker at once."""
        starts: dict[Seat, Future[Any]] = {}
        for seat, worker in self._workers.items():
            handle = self._spawn(seat)
            starts[seat] = handle.submit("start")
            worker.begins(handle, starts[seat], time.monotonic(), self._changed.set)
        for seat, future in starts.items():
            future.add_done_callback(lambda f, w=self._workers[seat]: self._started(w, f))  # type: ignore[misc]
        self._gather(starts, self._deployment.cluster.start_s, "start", "cluster.start_s")
        for seat, future in starts.items():  # a future wakes who waits for it before it runs its callbacks
            self._started(self._workers[seat], future)

    def _restarts(self) -> Restarts:
        return Restarts(self._deployment.cluster.restarts, self._deployment.cluster.restart_window_s)

    def _spawn(self, seat: Seat) -> Handle:
        path = self._roles.ffn if seat.role is Role.FFN else self._roles.attention
        with self._membership:  # whoever stops the cluster finds this worker in its seat, or it is not started
            handle = self._spawn_worker(seat.name, path, seat.role, seat.rank)
            self._workers[seat].handle = handle
            return handle

    def _spawn_standby(self, name: str) -> Handle:
        with self._membership:
            return self._spawn_worker(name, self._roles.ffn, Role.FFN, None)

    def _spawn_worker(self, name: str, path: str, role: Role, rank: int | None) -> Handle:
        if self._stopping.is_set():
            raise ClusterError("the cluster is being stopped")
        neighbours = self._host.workers_on_host(len(wanted(self._deployment)))
        args = (self._deployment, rank, self._epoch, neighbours, self._credentials)
        return self._host.spawn(name, path, args, resources_of(self._deployment, role))

    def _started(self, worker: Worker, future: Future[Any]) -> None:
        """Notes the address a worker's first start gave, once; runs in whichever thread ended the call."""
        if future.exception() is None:
            with self._noting:
                if worker.phase is Phase.STARTING:
                    worker.started(future.result())

    def _connect(self) -> None:
        """Lets every attention worker shake hands with every FFN worker."""
        ffn, attention = self._of(Role.FFN), self._of(Role.ATTENTION)
        addresses = [w.ffn_address for w in ffn if w.ffn_address is not None]
        calls = {w.seat: w.handle.submit("connect", addresses) for w in attention if w.handle is not None}
        timeout_s = self._deployment.transport.connect_s + CONNECT_MARGIN_S
        self._gather(calls, timeout_s, "connect to the FFN workers", "transport.connect_s", ffn)
        for worker in attention:
            worker.serves()

    def _gather(
        self,
        calls: dict[Seat, Future[Any]],
        timeout_s: float,
        what: str,
        knob: str,
        watched: Sequence[Worker] = (),
    ) -> None:
        """Waits for all calls; raises the first failure, or ClusterError when the time is over or a `watched` worker,
        which no call asks, is lost."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            done, late = wait(calls.values(), max(0.0, min(POLL_S, left_s)), FIRST_EXCEPTION)
            for worker in watched:
                assert worker.probe is not None, f"{worker.name} was never started"
                worker.probe.look(time.monotonic())  # before the calls' own failures, which only follow from it
            for future in done:
                future.result()
            if not late:
                return
            if left_s <= 0:
                names = ", ".join(seat.name for seat, future in calls.items() if future in late)
                raise ClusterError(f"{names} did not {what} within {timeout_s:g} s ({knob})")

    def _give_up(self, error: AfdError) -> None:
        stopped = self._stopping.is_set()
        self._stopping.set()
        self._end_workers(0.0)
        self._ready.set_exception(ClusterError("the cluster was stopped before it was ready") if stopped else error)

    def _end_workers(self, drain_s: float) -> None:
        """Asks what serves to stop, attention workers first, since draining them takes the FFN side; then kills."""
        with self._membership:
            for role, args in ((Role.ATTENTION, (drain_s,)), (Role.FFN, ())):
                known = [w.handle for w in self._of(role) if w.handle is not None and w.phase in STARTED]
                wait(
                    [handle.submit("stop", *args) for handle in known],
                    STOP_MARGIN_S + (drain_s if role is Role.ATTENTION else 0.0),
                )
            self._kill_all()

    def _kill_all(self) -> None:
        for handle in [*(w.handle for w in self._workers.values()), *self._standbys.handles]:
            if handle is not None:
                handle.kill()

    def _of(self, role: Role) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.seat.role is role]


def new_epoch() -> int:
    """A name for a run that no other run on this machine or cluster has; below 2**52, exact in JSON."""
    return secrets.randbits(52)
