"""Which nodes Ray has, and the address by which it knows each: what `transport.bind: auto` and `node` come down to."""

from __future__ import annotations

from afd.cluster.placement import shortage
from afd.cluster.ray_core import NodeAffinitySchedulingStrategy, get_node_ip_address, ray
from afd.config import Deployment


def num_alive() -> int:
    """How many nodes there are."""
    return sum(1 for node in ray.nodes() if node["Alive"])


def bound(deployment: Deployment) -> Deployment:
    """The deployment with `transport.bind: auto` resolved: 127.0.0.1 where one node, which is then this one, holds
    every worker, else "node". A Ray that may only later gain the nodes it needs counts as several."""
    if deployment.transport.bind != "auto":
        return deployment
    alone = num_alive() == 1 and not shortage(deployment, ray.cluster_resources())
    return deployment.with_flags({"transport.bind": "127.0.0.1" if alone else "node"})


def at_home(deployment: Deployment) -> Deployment:
    """The deployment with `transport.bind: node` resolved, in an actor: the address of the node it runs on."""
    if deployment.transport.bind != "node":
        return deployment
    return deployment.with_flags({"transport.bind": get_node_ip_address()})


def beside_me() -> NodeAffinitySchedulingStrategy:
    """Places an actor on this process's node if it can be: what watches the workers is lost with the router, and not
    with some worker's node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
