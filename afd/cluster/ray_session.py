"""Ray for this process: the cluster at RAY_ADDRESS, or one of our own in a temporary folder, gone with the block."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from afd import env
from afd.cluster.controller import new_epoch
from afd.cluster.placement import demand, shortage
from afd.cluster.ray_core import RayError, ray
from afd.config import Deployment
from afd.errors import ClusterError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; calls here are a few hundred bytes
STARTS = 2  # of a Ray of our own: now and then one of its processes hangs while it starts

_RAY_ERRORS = (RayError, ConnectionError, RuntimeError, OSError, ValueError)  # of ray.init


@contextmanager
def session(deployment: Deployment) -> Iterator[None]:
    """Ray, initialised for this process: the cluster at RAY_ADDRESS, or one that lives as long as the block and is big
    enough for `deployment`. Raises ClusterError as `cluster` does."""
    address = os.environ.get("RAY_ADDRESS", "")
    with joined(address) if address else _own(deployment):
        short = shortage(deployment, ray.cluster_resources())
        if short and not address:
            raise ClusterError(short)
        if short:
            log.warning("%s; waiting for the Ray cluster to grow, for at most cluster.start_s", short)
        yield


@contextmanager
def joined(address: str) -> Iterator[None]:
    """The Ray cluster at `address`, for this process. Raises ClusterError."""
    try:
        _join(address)
    except _RAY_ERRORS as error:
        raise ClusterError(f"the Ray cluster at RAY_ADDRESS={address} cannot be joined: {_short(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own(deployment: Deployment) -> Iterator[None]:
    folder = ""
    for tries_left in reversed(range(STARTS)):
        folder = tempfile.mkdtemp(prefix="afd-ray-", dir="/tmp")  # short: sockets lie deep below, with 107 characters
        try:
            _start(deployment, folder)
            break
        except _RAY_ERRORS as error:
            _sweep(folder)
            if not tries_left:
                raise ClusterError(f"Ray cannot start: {_short(error)}") from error
            log.warning("Ray did not start, and is started again: %s", _short(error))
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: str) -> None:
    """Ends what a start that failed has left: Ray itself forgets the processes of a node that it could not complete."""
    ray.shutdown()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(folder) in entry.read_bytes():
                os.kill(pid := int(entry.parent.name), signal.SIGKILL)
                os.waitpid(pid, 0)
    shutil.rmtree(folder, ignore_errors=True)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _start(deployment: Deployment, folder: str) -> None:
    """A Ray on this machine alone, with as many logical CPUs as the workers reserve, whatever the machine has."""
    with env.without_secrets():
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            num_cpus=math.ceil(demand(deployment).get("CPU", 0.0)) or 1,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.ERROR,
            namespace=f"afd-{new_epoch()}",
            _temp_dir=folder,
        )


def _join(address: str) -> None:
    # No secrets: Ray shows and logs what is here.
    settings = {name: value for name, value in env.for_children().items() if name in env.KNOWN}
    ray.init(
        address=address,
        logging_level=logging.ERROR,
        namespace=f"afd-{new_epoch()}",
        runtime_env={"env_vars": settings},
    )
