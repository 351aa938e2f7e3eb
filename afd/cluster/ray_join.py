"""Another process's way to a run on Ray: it finds the controller by its name, and lets the run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from afd.cluster.ray_core import RayError, list_named_actors, ray
from afd.cluster.ray_host import ASK_S, CONTROLLER, RayHandle, RayRun
from afd.cluster.ray_session import joined
from afd.config import Deployment
from afd.credentials import Credentials
from afd.errors import ClusterError


@contextmanager
def run(address: str, epoch: int | None) -> Iterator[tuple[RayRun, Deployment, Credentials]]:
    """The run of `epoch`, or the only one, on the Ray cluster at `address`, what it was started with, and what its
    workers ask for.

    Raises ClusterError when there is no such run, or more than one and no `epoch`."""
    with joined(address):
        controller = _find(address, epoch)
        deployment: Deployment = controller.call("deployment", timeout_s=ASK_S)
        credentials: Credentials = controller.call("credentials", timeout_s=ASK_S)
        found = RayRun(controller, controller.call("view", timeout_s=ASK_S))
        try:
            yield found, deployment, credentials
        finally:
            found.leave()


def _find(address: str, epoch: int | None) -> RayHandle:
    try:
        named = [actor for actor in list_named_actors(all_namespaces=True) if actor["name"].startswith(CONTROLLER)]
        epochs = sorted(actor["name"].removeprefix(CONTROLLER) for actor in named)
        wanted = [actor for actor in named if epoch is None or actor["name"] == f"{CONTROLLER}{epoch}"]
        if len(wanted) == 1:
            return RayHandle("controller", ray.get_actor(wanted[0]["name"], wanted[0]["namespace"]))
    except (RayError, ValueError) as error:
        raise ClusterError(f"the Ray cluster at RAY_ADDRESS={address} did not say what runs on it: {error}") from error
    if not epochs:
        raise ClusterError(f"nothing is served on the Ray cluster at RAY_ADDRESS={address}; start it with `afd serve`")
    which = "which one is meant? " if epoch is None else f"none has the epoch {epoch}; "
    raise ClusterError(f"on the Ray cluster at RAY_ADDRESS={address}, {which}--epoch may be {', '.join(epochs)}")
