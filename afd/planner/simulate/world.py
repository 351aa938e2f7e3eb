"""What all workers of a simulation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afd.planner.simulate.agenda import Agenda
from afd.planner.simulate.clock import Clock
from afd.planner.simulate.disturbance import Disturbance
from afd.planner.simulate.ledger import Ledger
from afd.planner.simulate.policies import Policies
from afd.planner.simulate.recorder import Recorder
from afd.planner.simulate.scenario import Scenario
from afd.types import Role


@dataclass(frozen=True, slots=True)
class World:
    """`luck`: the draws that jitter is made of."""

    scenario: Scenario
    policies: Policies
    clock: Clock
    agenda: Agenda
    ledger: Ledger
    recorder: Recorder
    luck: Sequence[float]

    def disturbance(self, role: Role, rank: int) -> Disturbance:
        worker = rank if role is Role.ATTENTION else self.scenario.topology.attention + rank
        return Disturbance(self.luck, worker, self.scenario.jitter, self.scenario.slow.get((role, rank), 1.0))
