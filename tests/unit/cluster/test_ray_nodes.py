"""Where workers listen, as the nodes of Ray decide it; several nodes: tests/system/test_two_hosts.py."""

from __future__ import annotations

import pytest

from afd.config import Deployment, parse

pytestmark = pytest.mark.ray
ray_nodes = pytest.importorskip("afd.cluster.ray_nodes")


@pytest.mark.usefixtures("ray_session")
def test_auto_is_loopback_on_one_node_that_holds_all_and_else_each_nodes_own_address() -> None:
    big = parse({"ffn": {"resources": {"custom": {"on_a_node_that_comes_later": 1.0}}}}, "a test")
    assert ray_nodes.bound(Deployment()).transport.bind == "127.0.0.1"
    assert ray_nodes.bound(big).transport.bind == "node"


@pytest.mark.usefixtures("ray_session")
def test_an_address_that_is_named_stays() -> None:
    named = Deployment().with_flags({"transport.bind": "192.0.2.7"})
    assert ray_nodes.at_home(ray_nodes.bound(named)) == named


@pytest.mark.usefixtures("ray_session")
def test_a_node_is_known_by_the_address_that_ray_has_for_it() -> None:
    told = Deployment().with_flags({"transport.bind": "node"})
    assert ray_nodes.at_home(told).transport.bind == "127.0.0.1"  # where our own Ray listens
