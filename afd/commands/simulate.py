"""`afd simulate`: a deployment played out in simulated time, by the workers' own policies."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from afd import config
from afd.cluster.roles import load
from afd.commands.plan import cards
from afd.commands.planned import precision, resolve
from afd.commands.trace import bubbles
from afd.config import Deployment
from afd.errors import ConfigError
from afd.pipeline import perfetto
from afd.pipeline.analysis import Picture, picture
from afd.pipeline.summary import Summary, summarise
from afd.planner.candidates import USABLE, expected_skew
from afd.planner.models import Planned
from afd.planner.roofline import Roofline, Workers
from afd.planner.simulate.outcome import Outcome, Spread
from afd.planner.simulate.policies import Limits, Policies
from afd.planner.simulate.run import Simulation
from afd.planner.simulate.scenario import Demand, Fault, Scenario, weight
from afd.topology import ffn_shards
from afd.types import Role

GIB = 1 << 30

_STRAGGLER = re.compile(r"(attention|ffn):(\d+)x([0-9.]+)")
_FAULT = re.compile(r"ffn:(\d+)@([0-9.]+)\+([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's words. None: as the deployment says, or what fits it."""

    deployment: Path | None
    model: str | None
    hardware: str
    topology: str | None
    context: int
    batch: int | None
    microbatches: str | None
    ffn_sharding: str | None
    dtype: str | None
    cards_per_worker: int | None
    steps: int
    spread: float
    rate: float | None
    jitter: float
    skew: float | None
    straggler: Sequence[str]
    fault: Sequence[str]
    seed: int
    trace_from: float | None


@dataclass(frozen=True, slots=True)
class _Asked:
    scenario: Scenario
    times: Roofline
    cards: int


def simulate(options: Options, output: Path | None, as_json: bool) -> None:
    """Prints what came of it, and writes the trace where wanted. Raises ConfigError, ModelError."""
    asked = _ask(options)
    began_s = time.perf_counter()
    simulation = Simulation(asked.scenario, asked.times, _policies(), record_from_s=options.trace_from)
    outcome = simulation.run()
    took_s = time.perf_counter() - began_s
    seen = picture(simulation.timelines(), outcome.simulated_s)
    if output is not None:
        _write(output, seen)
    if as_json:
        figures = asdict(outcome) | {"tokens_per_s_per_card": outcome.tokens_per_s / asked.cards, "cards": asked.cards}
        print(json.dumps(figures | {"took_s": took_s, "timeline": asdict(summarise(seen))}))
    else:
        _print(asked, outcome, summarise(seen), took_s)
        if output is not None:
            print(f"{output}: {seen.window_s:.3f} s of it; open it at ui.perfetto.dev")


def _policies() -> Policies:
    """The workers' own (afd.planner.simulate.policies says why by name)."""
    return Policies(
        attention=load("attention_worker.replay:Replay"),
        batcher=load("ffn_worker.batcher:Batcher"),
        item=load("ffn_worker.batcher:Item"),
    )


def _ask(options: Options) -> _Asked:
    flags = {
        "model": options.model,
        "topology": options.topology,
        "ffn.sharding": options.ffn_sharding,
        "attention.microbatches": int(m) if (m := options.microbatches) and m.isdigit() else m,
    }
    deployment = config.load(options.deployment).with_flags(flags)
    model = resolve(deployment.model)
    if options.dtype is not None:
        model = Planned(model.name, model.spec, precision(options.dtype))
    each = options.cards_per_worker or max(1, round(deployment.attention.resources.num_gpus))
    attention, ffn = cards(options.hardware)
    counts = deployment.counts
    shards = ffn_shards(counts.ffn, deployment.ffn.sharding, model.spec.num_experts, deployment.ffn.tp)
    times = Roofline(model, Workers(attention, each), Workers(ffn, each), shards[0])
    for flag, value in (
        ("--context", options.context - 1),
        ("--steps", options.steps),
        ("--batch", options.batch or 1),
    ):
        if value < 1:
            raise ConfigError(f"{flag} is too small; it must be at least {2 if flag == '--context' else 1}")
    batch = options.batch or deployment.attention.max_running * counts.attention
    requests = -(-batch // counts.attention)
    limits = _limits(deployment, times, requests, options)
    skew = options.skew
    if skew is None:
        skew = min(expected_skew(model, shards[0].ep, batch / limits.microbatches), shards[0].ep)
    scenario = Scenario(
        counts,
        shards,
        limits,
        Demand(requests, options.context, options.steps, options.spread, options.rate),
        gather_window_s=deployment.ffn.gather_window_us / 1e6,
        jitter=options.jitter,
        skew=skew,
        slow=dict(_straggler(text) for text in options.straggler),
        faults=tuple(_fault(text) for text in options.fault),
        seed=options.seed,
    )
    return _Asked(scenario, times, each * (counts.attention + counts.ffn))


def _limits(deployment: Deployment, times: Roofline, requests: int, options: Options) -> Limits:
    """Of an attention worker with room for what its cards hold. Without a deployment file, its limits on requests and
    tokens are those that the batch needs."""
    settings = deployment.attention
    spec, precision = times.model.spec, times.model.precision
    held = spec.held_bytes(options.context, precision.kv, precision.window) / options.context  # bytes per token
    room = USABLE * times.attention.card.memory_bytes - times.attention_memory(0, options.context)
    if settings.kv_cache_gib != "auto":
        room = settings.kv_cache_gib * GIB / times.attention.cards
    needed = 0 if options.deployment else requests
    return Limits(
        microbatches=settings.most_microbatches,
        auto=settings.microbatches == "auto",
        max_batch_tokens=max(settings.max_batch_tokens, needed),
        max_running=max(settings.max_running, needed),
        kv_tokens=max(0, int(room * times.attention.cards / held)),
        block_size=settings.block_size,
        target_s=None if settings.tpot_target_ms is None else settings.tpot_target_ms / 1e3,
        weight=1 if options.rate is not None else weight(requests),
    )


def _straggler(text: str) -> tuple[tuple[Role, int], float]:
    match = _STRAGGLER.fullmatch(text)
    if match is None:
        raise ConfigError(f"--straggler is {text!r}; it is like attention:3x2 (attention worker 3, twice as slow)")
    return (Role(match[1]), int(match[2])), _number("--straggler", match[3])


def _fault(text: str) -> Fault:
    match = _FAULT.fullmatch(text)
    if match is None:
        raise ConfigError(f"--fault is {text!r}; it is like ffn:1@0.5+0.2 (FFN worker 1, from 0.5 s on, for 0.2 s)")
    return Fault(int(match[1]), _number("--fault", match[2]), _number("--fault", match[3]))


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} holds {text!r}, which is not a number") from None


def _write(path: Path, seen: Picture) -> None:
    try:
        path.write_text(json.dumps(perfetto.document(seen)))
    except OSError as error:
        raise ConfigError(f"cannot write the trace to {path} (-o): {error.strerror}") from error


def _print(asked: _Asked, outcome: Outcome, summary: Summary, took_s: float) -> None:
    console, scenario = Console(highlight=False), asked.scenario
    console.print(
        f"{asked.times.model.name} on {scenario.topology}, {asked.cards} cards: {outcome.requests} requests at "
        f"{scenario.demand.context} tokens of context; {outcome.simulated_s:.3f} s in {outcome.events} events, "
        f"simulated in {took_s:.1f} s."
    )
    if scenario.limits.weight > 1:
        console.print(f"{scenario.limits.weight} requests that are alike are one sequence of the schedulers.")
    table = Table("", "mean", "p50", "p90", "p99")
    for name, spread in (("TTFT", outcome.ttft_s), ("TPOT", outcome.tpot_s), ("between tokens", outcome.gap_s)):
        if spread is not None:
            table.add_row(name, *_milliseconds(spread))
    console.print(table)
    per_card = outcome.tokens_per_s / asked.cards
    console.print(f"{outcome.tokens_per_s:.0f} tokens/s, {per_card:.0f} a card; {outcome.tokens} tokens in all")
    console.print(", ".join(f"{role} busy {100 * share:.1f} %" for role, share in outcome.busy.items()))
    if outcome.preemptions or outcome.sent_again:
        console.print(f"{outcome.preemptions} requests preempted, {outcome.sent_again} dispatches sent again")
    console.print(bubbles(asdict(summary)))
    console.print(
        f"(the bubbles are those of {summary.window_s:.3f} s, from the middle unless --trace-from says where)"
    )


def _milliseconds(spread: Spread) -> list[str]:
    return [f"{1e3 * value:.2f} ms" for value in (spread.mean, spread.p50, spread.p90, spread.p99)]
