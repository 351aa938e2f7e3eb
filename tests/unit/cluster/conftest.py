from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager

import pytest

from afd.cluster import local
from afd.cluster.controller import Cluster
from afd.cluster.host import Host
from afd.cluster.inproc import ThreadHost
from afd.cluster.local import ProcessHost
from afd.config import Deployment
from tests.unit.cluster.clusters import TOYS, OpenCluster


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests here."""
    ray_session = pytest.importorskip("afd.cluster.ray_session")
    with ray_session.session(Deployment().with_flags({"topology": "2A2F", "cluster.standby_ffn": 1})):
        yield


@pytest.fixture(params=["threads", "processes", pytest.param("ray", marks=pytest.mark.ray)])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        made: Host = pytest.importorskip("afd.cluster.ray_host").RayHost()
    else:
        made = ThreadHost() if request.param == "threads" else ProcessHost()
    with closing(made):
        yield made


@contextmanager
def _ray_cluster(deployment: Deployment) -> Iterator[Cluster]:
    running = pytest.importorskip("afd.cluster.ray_host").RayCluster(deployment, TOYS)
    try:
        yield running
    finally:
        running.stop(0.0)


def _local_cluster(deployment: Deployment) -> AbstractContextManager[Cluster]:
    return local.cluster(deployment, TOYS)


def _thread_cluster(deployment: Deployment) -> AbstractContextManager[Cluster]:
    return local.cluster(deployment.with_flags({"transport.kind": "inproc"}), TOYS)


@pytest.fixture(params=["threads", "processes", pytest.param("ray", marks=pytest.mark.ray)])
def open_cluster(request: pytest.FixtureRequest) -> OpenCluster:
    """Opens a cluster of toys on each kind of host."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        return _ray_cluster
    return _thread_cluster if request.param == "threads" else _local_cluster


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.ray)])
def open_processes(request: pytest.FixtureRequest) -> OpenCluster:
    """The same where a worker is a process of its own."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        return _ray_cluster
    return _local_cluster
