"""Workers as Ray actors, and the cluster whose controller is one too. Ray carries calls, never activations.

`cluster` starts a Ray of its own in a temporary folder, or joins the one at RAY_ADDRESS. Either way the run has its
own namespace, and ends only the actors it started.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from typing import Any

from afd.cluster.controller import Controller, new_epoch
from afd.cluster.host import Handle, Host, settle
from afd.cluster.ray_core import ActorDiedError, OutOfMemoryError, list_named_actors, ray
from afd.cluster.ray_nodes import beside_me, bound, num_alive
from afd.cluster.ray_process import end_process
from afd.cluster.ray_servant import RayServant, RayWorker
from afd.cluster.ray_session import session
from afd.cluster.roles import Roles
from afd.cluster.servant import Outcome
from afd.config import Deployment, Resources
from afd.credentials import Credentials, for_run
from afd.errors import ClusterError
from afd.pipeline.timeline import Timelines
from afd.types import ClusterView

log = logging.getLogger(__name__)

CONTROLLER = "afd-controller-"  # and the epoch: what a run's controller is called in Ray
LIFE = " life "  # between a worker's name and what tells its lives apart, in the name of its actor
CALLS_AT_ONCE = 8  # start or stop may take long; status must get through meanwhile
END_S = 3.0  # for a killed actor to be gone
ASK_S = 10.0  # longest wait for the controller's answer
WATCH_S = 0.2  # how often the controller is asked for the view


class RayHandle(Handle):
    """An actor. `pid` and `node` become known once Ray has placed it, `died` once a call fails of its death."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.died = False
        self._actor = actor
        self._node_id = ""
        self._open: set[Future[Any]] = set()
        self.locate()

    def locate(self) -> None:
        """Asks the actor where it runs, which changes when Ray starts it again."""
        self._actor.identity.remote().future().add_done_callback(self._placed)

    def submit(self, method: str, *args: object) -> Future[Any]:
        future: Future[Any] = Future()
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        answer = self._actor.call.remote(method, args).future()
        answer.add_done_callback(lambda done: settle(future, self._outcome(done)))
        return future

    def kill(self) -> None:
        unheard = bool(self._open) and not self.died
        ray.kill(self._actor)
        if unheard:
            end_process(self.pid, self._node_id)
        with suppress(FutureTimeout):  # it fails as soon as Ray knows that the actor is gone
            self._actor.identity.remote().future().exception(END_S)

    def _placed(self, done: Future[Any]) -> None:
        if done.exception() is None:
            self.pid, self.node, self._node_id = done.result()

    def _outcome(self, done: Future[Any]) -> Outcome:
        error = done.exception()
        if error is None:
            outcome: Outcome = done.result()
            return outcome
        self.died = self.died or isinstance(error, (ActorDiedError, OutOfMemoryError))
        who = f"{self.name} (pid {self.pid} on {self.node})" if self.pid else self.name
        if isinstance(error, OutOfMemoryError):
            return None, ClusterError(f"{who} was killed by Ray for want of memory")
        if isinstance(error, ActorDiedError):
            return None, ClusterError(f"{who} exited: it crashed, or was killed by somebody or for want of memory")
        return None, ClusterError(f"{who} cannot be reached through Ray: {' '.join(str(error).split())[:300]}")


class RayHost(Host):
    """Starts workers as actors. Holds nothing, so that it can be sent to the controller's own actor."""

    def spawn(self, name: str, role: str, args: tuple[object, ...], resources: Resources) -> RayHandle:
        actor = ray.remote(RayWorker).options(
            name=f"{name}{LIFE}{secrets.token_hex(4)}",
            lifetime="detached",  # from the controller, not from the run: RayCluster and RayWorker see to that
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            accelerator_type=resources.accelerator_type,
            resources=resources.custom,
            max_concurrency=CALLS_AT_ONCE,
            max_restarts=0,
        )
        return RayHandle(name, actor.remote(name, role, args))

    def survivors(self) -> list[tuple[str, Handle]]:
        return [(name.split(LIFE)[0], RayHandle(name.split(LIFE)[0], actor)) for name, actor in _workers()]

    def workers_on_host(self, workers: int) -> int:
        return math.ceil(workers / num_alive())

    def close(self) -> None:
        pass


def _workers() -> list[tuple[str, Any]]:
    """Every worker of this run that lives, by the name of its actor."""
    found = []
    for name in list_named_actors():
        with suppress(ValueError):  # it went meanwhile
            found.append((name, ray.get_actor(name)))
    return [(name, actor) for name, actor in found if LIFE in name]


class RayController(Controller):
    """The controller as an actor builds it: running from the first call. One that Ray started again finds the workers
    that the one before has left."""

    def __init__(self, deployment: Deployment, roles: Roles, epoch: int, credentials: Credentials) -> None:
        super().__init__(deployment, RayHost(), roles, epoch, credentials)
        self.begin()


class RayRun:
    """A run, as who holds its controller actor sees it. A thread of its own keeps the view fresh, so that a controller
    that is slow to answer holds nobody up."""

    def __init__(self, controller: RayHandle, view: ClusterView) -> None:
        """`view` is what is known until the controller has said more."""
        self._controller = controller
        self._view = view
        self._asking = threading.Lock()  # so that no older view is stored over a newer one
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watches the controller", daemon=True)
        self._watcher.start()

    def view(self) -> ClusterView:
        """See Cluster: what the controller said last, at once. When it is away, the workers serve on without it."""
        return self._view

    def timelines(self, seconds: float, max_events: int) -> Timelines:
        """See Cluster. Raises ClusterError when the controller does not answer."""
        answer: Timelines = self._controller.call("timelines", seconds, max_events, timeout_s=ASK_S)
        return answer

    def leave(self) -> None:
        """Looks no more; the run goes on."""
        self._ended.set()
        self._watcher.join(ASK_S)

    def _refresh(self) -> None:
        with self._asking:
            self._view = self._controller.call("view", timeout_s=ASK_S)

    def _watch(self) -> None:
        away = False
        while not self._ended.wait(WATCH_S):
            try:
                self._refresh()
            except ClusterError as error:
                if not self._ended.is_set() and not away:
                    log.warning("the controller is away (%s); the workers serve on, as they were seen last", error)
                away = True
            else:
                if away:
                    self._controller.locate()
                away = False


class RayCluster(RayRun):
    """The run of who started it (afd.cluster.controller.Cluster). Its controller has a name in Ray, so that further
    routers find it (afd.cluster.ray_join)."""

    def __init__(self, deployment: Deployment, roles: Roles, credentials: Credentials | None = None) -> None:
        epoch = new_epoch()
        path = f"{RayController.__module__}:{RayController.__name__}"
        controller = ray.remote(RayServant).options(
            num_cpus=0,
            max_concurrency=CALLS_AT_ONCE,
            max_restarts=-1,
            name=f"{CONTROLLER}{epoch}",
            scheduling_strategy=beside_me(),
        )
        args = (bound(deployment), roles, epoch, credentials or for_run(deployment))
        handle = RayHandle("controller", controller.remote("controller", path, args))
        super().__init__(handle, ClusterView(epoch, deployment.model, deployment.topology))

    def wait_ready(self, timeout_s: float) -> bool:
        """See Cluster."""
        ready: bool = self._controller.call("wait_ready", timeout_s, timeout_s=timeout_s + ASK_S)
        if ready:
            self._refresh()
        return ready

    def stop(self, drain_s: float) -> None:
        """See Cluster."""
        if self._ended.is_set():
            return
        try:
            self._controller.call("stop", drain_s, timeout_s=drain_s + ASK_S)
        except ClusterError as error:
            log.warning("the controller did not stop the workers (%s); Ray ends them", error)
        self._ended.set()
        self._controller.kill()
        for _, actor in _workers():  # whom no controller has ended
            ray.kill(actor)
        self._watcher.join(ASK_S)


@contextmanager
def cluster(
    deployment: Deployment,
    roles: Roles = Roles(),  # noqa: B008
    credentials: Credentials | None = None,
) -> Iterator[RayCluster]:
    """A running cluster on Ray. Yields at once; on the way out every actor is ended, and a Ray of our own removed.
    `credentials` None: with a token of its own.

    Call it from a thread that outlives the cluster: the kernel ends Ray's processes with the thread that started them.
    Raises ClusterError when Ray cannot start or be joined, or when a Ray of our own cannot hold the deployment.
    """
    with session(deployment):
        running = RayCluster(deployment, roles, credentials)
        try:
            yield running
        finally:
            running.stop(0.0)
