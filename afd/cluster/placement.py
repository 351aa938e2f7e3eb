"""What each worker asks of the machine it is placed on."""

from __future__ import annotations

from collections.abc import Mapping

from afd.config import Deployment, Resources
from afd.types import Role


def wanted(deployment: Deployment) -> list[tuple[Role, int]]:
    """Every worker the deployment asks for, as (role, attention_rank or ffn_rank); FFN workers first."""
    counts = deployment.counts
    ffn = [(Role.FFN, rank) for rank in range(counts.ffn)]
    return ffn + [(Role.ATTENTION, rank) for rank in range(counts.attention)]


def resources_of(deployment: Deployment, role: Role) -> Resources:
    """What one worker of `role` reserves."""
    return deployment.ffn.resources if role is Role.FFN else deployment.attention.resources


def demand(deployment: Deployment) -> dict[str, float]:
    """What all workers together reserve, by Ray's resource names ("CPU", "GPU", custom ones)."""
    total: dict[str, float] = {}
    for role, _ in wanted(deployment):
        resources = resources_of(deployment, role)
        for name, amount in {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}.items():
            total[name] = total.get(name, 0.0) + amount
    return {name: amount for name, amount in total.items() if amount}


def shortage(deployment: Deployment, available: Mapping[str, float]) -> str:
    """One sentence on what `available` lacks for the deployment, or "" when everything fits."""
    needed = demand(deployment)
    short = [
        f"{n:g} {name} (there are {available.get(name, 0):g})"
        for name, n in needed.items()
        if n > available.get(name, 0)
    ]
    if not short:
        return ""
    return f"{deployment.topology} needs {', '.join(short)}; change topology, attention.resources or ffn.resources"
