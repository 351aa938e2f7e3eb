"""What each worker asks of the machine it is placed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from afd.config import Deployment, Resources
from afd.types import Role

ACCELERATOR = 0.001  # of the resource "accelerator_type:X", for an actor that asks for X; a node with X offers 1


class Seat(NamedTuple):
    """One worker that should be there: its attention_rank or ffn_rank, and which of that rank's replicas it is."""

    role: Role
    rank: int
    replica: int = 0

    @property
    def name(self) -> str:
        """For messages and logs."""
        return f"{self.role.value}_rank {self.rank}" + (f" replica {self.replica}" if self.replica else "")


def wanted(deployment: Deployment) -> list[Seat]:
    """Every worker that the deployment asks for, standbys aside; FFN workers first."""
    counts = deployment.counts
    ffn = [Seat(Role.FFN, rank, replica) for rank in range(counts.ffn) for replica in range(deployment.ffn.replicas)]
    return ffn + [Seat(Role.ATTENTION, rank) for rank in range(counts.attention)]


def resources_of(deployment: Deployment, role: Role) -> Resources:
    """What one worker of `role` reserves."""
    return deployment.ffn.resources if role is Role.FFN else deployment.attention.resources


def demand(deployment: Deployment) -> dict[str, float]:
    """What all workers and standbys together reserve, by Ray's resource names ("CPU", "GPU", custom ones), and of each
    card they ask for by type the least bit that Ray reserves."""
    total: dict[str, float] = {}
    for role in [seat.role for seat in wanted(deployment)] + [Role.FFN] * deployment.cluster.standby_ffn:
        resources = resources_of(deployment, role)
        card = {f"accelerator_type:{resources.accelerator_type}": ACCELERATOR} if resources.accelerator_type else {}
        amounts = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom, **card}
        for name, amount in amounts.items():
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
