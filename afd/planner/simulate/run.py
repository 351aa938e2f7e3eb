"""A simulated cluster, from its scenario to its figures."""

from __future__ import annotations

from afd.pipeline.timeline import Timelines
from afd.planner.simulate.agenda import Agenda
from afd.planner.simulate.attention import AttentionWorker
from afd.planner.simulate.clock import Clock
from afd.planner.simulate.disturbance import luck
from afd.planner.simulate.ffn import FfnWorker
from afd.planner.simulate.ledger import Ledger
from afd.planner.simulate.outcome import Outcome, Spread, tokens_per_s
from afd.planner.simulate.policies import Policies
from afd.planner.simulate.recorder import MOST_MARKS, Recorder
from afd.planner.simulate.scenario import Scenario, wanted
from afd.planner.simulate.world import World
from afd.planner.stages import StageTimes


class Simulation:
    """What `scenario` asks, with `times` as its clock; runs once. `record_from_s`: where its timelines begin;
    None: when half of all tokens are there. They have `most_marks` marks at most. Raises ConfigError when the requests
    do not fit."""

    def __init__(
        self,
        scenario: Scenario,
        times: StageTimes,
        policies: Policies,
        *,
        record_from_s: float | None = None,
        most_marks: int = MOST_MARKS,
    ) -> None:
        agenda = Agenda()
        recorder = Recorder(agenda.clock, most_marks)
        ledger = Ledger(recorder.begin if record_from_s is None else lambda: None)
        self._world = world = World(scenario, policies, Clock(times), agenda, ledger, recorder, luck(scenario.seed))
        self.attention = [AttentionWorker(rank, world) for rank in range(scenario.topology.attention)]
        self.ffn = [FfnWorker(shard, world) for shard in scenario.shards]
        for worker in self.attention:
            worker.connect(self.ffn)
        if record_from_s is not None:
            agenda.at(record_from_s, lambda *_: recorder.begin(), None)
        self._ask()
        for fault in scenario.faults:
            failing = self.ffn[fault.ffn_rank]
            agenda.at(fault.at_s, failing.fail, fault)
            agenda.at(fault.at_s + fault.for_s, failing.come_back, self.attention)

    def run(self) -> Outcome:
        """Until every request has all its tokens."""
        world = self._world
        world.agenda.run()
        ledger, weight = world.ledger, world.scenario.limits.weight
        end_s = max(ledger.last_s)
        return Outcome(
            requests=len(ledger.asked) * weight,
            tokens=sum(ledger.got) * weight,
            tokens_wanted=sum(ledger.asked) * weight,
            simulated_s=end_s,
            events=world.agenda.events,
            tokens_per_s=tokens_per_s(ledger, world.scenario.demand.rate is None) * weight,
            tpot_s=Spread.of(ledger.tpots_s()),
            gap_s=Spread.of(ledger.gaps_s),
            ttft_s=Spread.of(ledger.ttfts_s()),
            busy={
                "attention": sum(worker.busy_s for worker in self.attention) / len(self.attention) / end_s,
                "ffn": sum(worker.busy_s for worker in self.ffn) / len(self.ffn) / end_s,
            },
            preemptions=sum(worker.policy.preemptions for worker in self.attention) * weight,
            sent_again=sum(worker.sent_again for worker in self.attention),
        )

    def timelines(self) -> Timelines:
        """What was recorded, as a live cluster's; after `run`."""
        return self._world.recorder.timelines()

    def _ask(self) -> None:
        world = self._world
        for request in wanted(world.scenario):
            worker = self.attention[request.attention_rank]
            number = world.ledger.ask(request.tokens, request.at_s)
            if request.at_s is None:
                worker.policy.warm(number, request.context, request.tokens)
            else:
                world.agenda.at(request.at_s, worker.ask, (number, request.context, request.tokens))
        for worker in self.attention:
            world.agenda.at(0.0, worker.wake, None)
