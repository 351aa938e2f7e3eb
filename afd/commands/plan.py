"""`afd plan`: what to deploy, found by the planner's search."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from afd.commands.planned import precision, resolve
from afd.errors import ConfigError
from afd.loadtest.svg import Series, chart
from afd.planner.deployment import as_yaml
from afd.planner.explain import binding_limit, pays, row, verdict
from afd.planner.hardware import Card, card
from afd.planner.search import Ask, Found, Plan, search

_SHOWN = 12  # rows of the front
_TPOT = re.compile(r"([0-9]*\.?[0-9]+)\s*(us|ms|s)")
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_STYLE = (
    "<style>svg{background:#fff;font-family:sans-serif}.grid{stroke:#ddd}.tick,.axis{font-size:11px;fill:#444}"
    ".c0{stroke:#2f6f9f;fill:none;stroke-width:2}.d1{fill:#c8702a}.d0{fill:#2f6f9f}</style>"
)


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's words."""

    model: str
    hardware: str
    context: int
    tpot: str
    batch: int | None
    dtype: str | None
    cards_per_worker: int
    max_workers: int


def plan(options: Options, output: Path | None, plot: Path | None, as_json: bool) -> None:
    """Prints the plan, and writes the deployment file and the plot where wanted. Raises ConfigError, ModelError."""
    found = search(_ask(options))
    if output is not None:
        _write(output, as_yaml(found))
    if plot is not None:
        _write(plot, _drawn(found))
    if as_json:
        print(json.dumps(_as_json(found)))
        return
    _print(found)
    for path in (output, plot):
        if path is not None:
            print(f"written: {path}")


def _ask(options: Options) -> Ask:
    for flag, value in (
        ("--context", options.context),
        ("--batch", 1 if options.batch is None else options.batch),
        ("--cards-per-worker", options.cards_per_worker),
        ("--max-workers", options.max_workers),
    ):
        if value < 1:
            raise ConfigError(f"{flag} is {value}; it must be at least 1")
    model = resolve(options.model)
    if options.dtype is not None:
        model = replace(model, precision=precision(options.dtype))
    match = _TPOT.fullmatch(options.tpot.strip())
    if match is None or not float(match[1]) > 0:
        raise ConfigError(f"--tpot is {options.tpot!r}; it is a time above 0, like 50ms")
    attention, ffn = cards(options.hardware)
    return Ask(
        model,
        attention,
        ffn,
        options.context,
        float(match[1]) * _UNITS_S[match[2]],
        options.batch,
        options.cards_per_worker,
        options.max_workers,
    )


def cards(text: str) -> tuple[Card, Card]:
    """`A:H20,F:H800`, or one card for both."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and ":" not in text:
        return card(parts[0]), card(parts[0])
    by_role = {role.strip().upper(): name for role, _, name in (part.partition(":") for part in parts)}
    if by_role.keys() != {"A", "F"} or len(parts) != 2:
        raise ConfigError(f"--hardware is {text!r}; it is like A:H20,F:H800, or one card for both")
    return card(by_role["A"]), card(by_role["F"])


def _print(found: Plan) -> None:
    console = Console(highlight=False)
    ask, (how, point, _) = found.ask, found.best
    console.print(
        f"{ask.model.name}: {how} (workers of {ask.cards_per_worker} {ask.attention.name} and {ask.cards_per_worker} "
        f"{ask.ffn.name}), a batch of {point.batch}: {1e3 * point.step_s:.1f} ms per token, {point.tokens_per_s:.0f} "
        f"tokens/s, {point.tokens_per_s_per_card:.0f} a card, {point.usd_per_1m:.3g} USD per million tokens."
    )
    for line in (binding_limit(found), *verdict(found)):
        console.print(line)
    table = Table("deployment", "batch", "ms/token", "tokens/s/card", "USD/M", "paced by")
    shown = _thinned(found.front)
    for each in shown:
        table.add_row(*row(each))
    console.print(f"No other deployment beats these in latency, tokens per card and price ({len(found.front)} in all):")
    console.print(table)


def _thinned(front: Sequence[Found]) -> list[Found]:
    """At most _SHOWN of them, the ends included."""
    last, steps = len(front) - 1, min(len(front), _SHOWN) - 1
    return [front[round(i * last / steps)] for i in range(steps + 1)] if steps else list(front)


def _as_json(found: Plan) -> dict[str, object]:
    return {
        "best": _point(found.best),
        "limit": binding_limit(found),
        "afd_pays": pays(found),
        "verdict": verdict(found),
        "colocated": None if found.colocated is None else _point(found.colocated),
        "colocated_tuned": None if found.colocated_tuned is None else _point(found.colocated_tuned),
        "front": [_point(each) for each in found.front],
    }


def _point(found: Found) -> dict[str, object]:
    point = found.point
    return {
        "deployment": str(found.how),
        "batch": point.batch,
        "tpot_ms": 1e3 * point.step_s,
        "cards": point.cards,
        "tokens_per_s": point.tokens_per_s,
        "tokens_per_s_per_card": point.tokens_per_s_per_card,
        "usd_per_1m": point.usd_per_1m,
        "paced_by": point.binds,
        "capped_by": found.capped,
    }


def _drawn(found: Plan) -> str:
    """Tokens per second and card over the time per token, the plan marked."""
    front = [(1e3 * each.point.step_s, each.point.tokens_per_s_per_card) for each in found.front]
    best = [(1e3 * found.best.point.step_s, found.best.point.tokens_per_s_per_card)]
    drawn = chart(
        [Series("front", front, 0, dots=True), Series("plan", best, 1, dots=True)],
        "ms per token",
        "tokens/s per card",
    )
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{_STYLE}", 1) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
