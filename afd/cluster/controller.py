"""Starts the workers a deployment wants, connects them, and keeps watch: one class for every kind of host.

One thread does it all, in the order of `_run`: start what is wanted and not living, connect, then ask every worker
for its status a few times a second. A worker that is gone, silent or says so itself is marked lost, with one sentence.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from typing import Any, Protocol

from afd.cluster.host import Handle, Host
from afd.cluster.placement import resources_of, wanted
from afd.cluster.roles import Roles
from afd.cluster.timelines import collect
from afd.config import Deployment
from afd.credentials import OPEN, Credentials
from afd.errors import AfdError, ClusterError
from afd.pipeline.timeline import Timelines
from afd.types import ClusterView, FfnAddress, Role, WorkerView

log = logging.getLogger(__name__)

POLL_S = 0.25  # how often each worker is asked; a death is known after at most two
CONNECT_MARGIN_S = 10.0  # a worker's own transport.connect_s runs out first and has the better sentence
STOP_MARGIN_S = 1.5  # for a worker to end after draining, before it is killed
END_S = 5.0  # for the controller's own thread to end once no worker lives

NOT_COUNTERS = frozenset({"state", "message", "pid", "totals"})  # of a role's status


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


@dataclass
class _Worker:
    """A living worker. The view is replaced, never changed, so that other threads may read it."""

    handle: Handle
    view: WorkerView
    started: bool = False
    ffn_address: FfnAddress | None = None
    asked: Future[Any] | None = None  # the status call that is open
    asked_at: float = 0.0


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
        self._workers: dict[tuple[Role, int], _Worker] = {}
        self._ready: Future[None] = Future()
        self._stopping = threading.Event()
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
        """See Cluster."""
        workers = tuple(self._workers.values())
        views = tuple(replace(w.view, pid=w.handle.pid, node=w.handle.node) for w in workers)
        return ClusterView(self._epoch, self._deployment.model, self._deployment.topology, views)

    def deployment(self) -> Deployment:
        """What this run was started with."""
        return self._deployment

    def credentials(self) -> Credentials:
        """What its workers ask for. Who may ask here may read them in Ray's control service as well."""
        return self._credentials

    def timelines(self, seconds: float, max_events: int) -> Timelines:
        """See Cluster."""
        return collect([w.handle for w in tuple(self._workers.values()) if w.started], seconds, max_events)

    def stop(self, drain_s: float) -> None:
        """See Cluster."""
        self._stopping.set()
        self._end_workers(drain_s)
        if self._thread.is_alive():
            self._thread.join(END_S)
            if self._thread.is_alive():
                log.warning("the controller's thread did not end within %g s of its workers; it is left behind", END_S)

    def _run(self) -> None:
        try:
            self._start_missing()
            self._connect()
        except AfdError as error:
            self._give_up(error)
            return
        except Exception as error:
            log.exception("the controller failed")
            self._give_up(ClusterError(f"the controller failed: {type(error).__name__}: {error}"))
            return
        self._ready.set_result(None)
        while not self._stopping.wait(POLL_S):
            for worker in tuple(self._workers.values()):
                self._check(worker)

    def _start_missing(self) -> None:
        """Starts every wanted worker that does not live, all at once."""
        missing = [key for key in wanted(self._deployment) if key not in self._workers]
        starts = {key: self._spawn(*key).handle.submit("start") for key in missing}
        for (role, rank), future in starts.items():
            future.add_done_callback(lambda f, key=(role, rank): self._started(key, f))  # type: ignore[misc]
        self._gather(starts, self._deployment.cluster.start_s, "start", "cluster.start_s")
        for key, future in starts.items():  # a future wakes who waits for it before it runs its callbacks
            self._started(key, future)

    def _spawn(self, role: Role, rank: int) -> _Worker:
        path = self._roles.ffn if role is Role.FFN else self._roles.attention
        neighbours = self._host.workers_on_host(len(wanted(self._deployment)))
        args = (self._deployment, rank, self._epoch, neighbours, self._credentials)
        with self._membership:  # whoever stops the cluster finds this worker in the list, or it is not started
            if self._stopping.is_set():
                raise ClusterError("the cluster is being stopped")
            handle = self._host.spawn(f"{role.value}_rank {rank}", path, args, resources_of(self._deployment, role))
            worker = _Worker(handle, WorkerView(role, rank, "starting"))
            self._workers[role, rank] = worker
        return worker

    def _started(self, key: tuple[Role, int], future: Future[Any]) -> None:
        """Notes the address a worker's start gave, once; runs in whichever thread ended the call."""
        if future.exception() is not None:
            return
        worker, address = self._workers[key], future.result()
        with self._noting:
            if worker.started:
                return
            if isinstance(address, FfnAddress):
                worker.ffn_address = address
                worker.view = replace(worker.view, state="ready")
            else:  # an attention worker can serve only once it is connected
                worker.view = replace(worker.view, address=address)
            worker.started = True

    def _connect(self) -> None:
        """Lets every attention worker shake hands with every FFN worker."""
        addresses = [w.ffn_address for w in self._of(Role.FFN) if w.ffn_address is not None]
        attention = self._of(Role.ATTENTION)
        calls = {(Role.ATTENTION, w.view.rank): w.handle.submit("connect", addresses) for w in attention}
        timeout_s = self._deployment.transport.connect_s + CONNECT_MARGIN_S
        self._gather(calls, timeout_s, "connect to the FFN workers", "transport.connect_s", self._of(Role.FFN))
        for worker in attention:
            worker.view = replace(worker.view, state="ready")

    def _gather(
        self,
        calls: dict[tuple[Role, int], Future[Any]],
        timeout_s: float,
        what: str,
        knob: str,
        watched: Sequence[_Worker] = (),
    ) -> None:
        """Waits for all calls; raises the first failure, or ClusterError when the time is over or a `watched` worker,
        which no call asks, is lost."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            done, late = wait(calls.values(), max(0.0, min(POLL_S, left_s)), FIRST_EXCEPTION)
            for worker in watched:
                self._check(worker)
                if worker.view.state == "lost":  # before the calls' own failures, which only follow from it
                    raise ClusterError(worker.view.message)
            for future in done:
                future.result()
            if not late:
                return
            if left_s <= 0:
                names = ", ".join(self._workers[key].handle.name for key, future in calls.items() if future in late)
                raise ClusterError(f"{names} did not {what} within {timeout_s:g} s ({knob})")

    def _check(self, worker: _Worker) -> None:
        """Asks for a worker's status, or reads the answer to the last question."""
        if worker.asked is None:
            worker.asked, worker.asked_at = worker.handle.submit("status"), time.monotonic()
        silent_s = time.monotonic() - worker.asked_at
        if not worker.asked.done():
            if silent_s > self._deployment.transport.deadline_s:
                self._mark(worker, "lost", f"{worker.handle.name} has not answered for {silent_s:.0f} s")
            return
        answer, worker.asked = worker.asked, None
        error = answer.exception()
        if error is not None:
            self._mark(worker, "lost", str(error))
        else:
            status = answer.result()
            self._mark(worker, status["state"], status["message"])
            counters = {name: count for name, count in status.items() if name not in NOT_COUNTERS}
            worker.view = replace(worker.view, counters=counters, totals=status.get("totals"))

    def _mark(self, worker: _Worker, state: Any, message: str) -> None:
        if state == "lost" and worker.view.state != "lost" and not self._stopping.is_set():
            log.error("%s", message)
        worker.view = replace(worker.view, state=state, message=message)

    def _give_up(self, error: AfdError) -> None:
        stopped = self._stopping.is_set()
        self._stopping.set()
        self._end_workers(0.0)
        self._ready.set_exception(ClusterError("the cluster was stopped before it was ready") if stopped else error)

    def _end_workers(self, drain_s: float) -> None:
        """Asks what serves to stop, attention workers first, since draining them takes the FFN side; then kills."""
        with self._membership:
            for role, args in ((Role.ATTENTION, (drain_s,)), (Role.FFN, ())):
                calls = [w.handle.submit("stop", *args) for w in self._of(role) if w.started]
                wait(calls, STOP_MARGIN_S + (drain_s if role is Role.ATTENTION else 0.0))
            for worker in tuple(self._workers.values()):
                worker.handle.kill()

    def _of(self, role: Role) -> list[_Worker]:
        return [w for (r, _), w in sorted(self._workers.items()) if r is role]


def new_epoch() -> int:
    """A name for a run that no other run on this machine or cluster has; below 2**52, exact in JSON."""
    return secrets.randbits(52)
