"""`afd trace`: what every worker of a running server has just been doing, as a trace or as a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from afd.commands.http import check, client, fetch, foreign
from afd.errors import ConfigError

LEAST_SHARE = 0.001  # smaller shares of the window are not worth a row


def write(url: str, seconds: float, output: Path) -> None:
    """Writes the last `seconds` for Perfetto. Raises ConfigError when `output` cannot be written, Unavailable or
    RequestError when the server does not answer or refuses."""
    with client(url) as session:
        response = check(session.get("/debug/timeline", params={"seconds": seconds}))
    try:
        trace = response.json()
        window_s, missing = trace["otherData"]["window_s"], trace["otherData"]["summary"]["missing"]
        num_events = len(trace["traceEvents"])
    except (ValueError, KeyError, TypeError) as error:
        raise foreign(url) from error
    try:
        output.write_bytes(response.content)
    except OSError as error:
        raise ConfigError(f"cannot write the trace to {output} (-o): {error.strerror}") from error
    console = Console(highlight=False)
    console.print(f"{output}: the last {window_s:.2f} s, {num_events} events; open it at ui.perfetto.dev", markup=False)
    _tell_limits(console, seconds, window_s, missing)


def summary(url: str, seconds: float, as_json: bool) -> None:
    """Prints what the last `seconds` add up to. Raises as `write` does."""
    with client(url) as session:
        found = fetch(session, f"/debug/timeline?seconds={seconds:g}&format=summary")
    try:
        workers, waits, figures = _workers(found), bubbles(found), _figures(found)
        window_s, missing = float(found["window_s"]), found["missing"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise foreign(url) from error
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    for table in (workers, waits, figures):
        console.print(table)
    _tell_limits(console, seconds, window_s, missing)


def _tell_limits(console: Console, seconds: float, window_s: float, missing: list[str]) -> None:
    if window_s < 0.99 * seconds:
        console.print(
            f"the workers' rings reach back {window_s:.2f} s of the {seconds:g} s asked for",
            style="yellow",
            markup=False,
        )
    for sentence in missing:
        console.print(sentence, style="red", markup=False)


def _workers(found: dict[str, Any]) -> Table:
    table = Table(title=f"where the last {found['window_s']:.2f} s went")
    table.add_column("worker", no_wrap=True)
    table.add_column("busy", justify="right")
    table.add_column("doing")
    for worker in found["workers"]:
        table.add_row(worker["name"], _percent(worker["busy"]), _shares(worker["activities"]))
    return table


def bubbles(found: dict[str, Any]) -> Table:
    """Of a summary as JSON."""
    table = Table(title="bubbles: what each side waited for, as a share of its time")
    table.add_column("side", no_wrap=True)
    table.add_column("waits", justify="right")
    table.add_column("because of")
    for side, causes in found["bubbles"].items():
        table.add_row(side, _percent(sum(causes.values())), _shares(causes))
    return table


def _figures(found: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    busy = ", ".join(f"{side} {_percent(share)}" for side, share in found["busy"].items())
    table.add_row("pipeline efficiency", f"{_percent(found['efficiency'])}, the larger of: {busy}")
    table.add_row("tokens sampled", f"{found['sampled_tokens_per_s']:.1f} per second")
    table.add_row("tokens per dispatch", _number(found["tokens_per_dispatch"]))
    calls, joined = _number(found["tokens_per_ffn_call"]), _number(found["dispatches_per_ffn_call"])
    table.add_row("tokens per FFN call", f"{calls}, from {joined} dispatches")
    table.add_row("tokens per expert call", _number(found["tokens_per_expert_call"]))
    layer, all_layers = found["wire_bytes_per_token_and_layer"], found["wire_bytes_per_token"]
    table.add_row("bytes per token", f"{_number(all_layers, 0)} there and back; {_number(layer, 0)} a layer")
    for name, phase in found["phases"].items():
        table.add_row(f"dispatch: {name}", f"median {phase['median_us']:.0f} us, mean {phase['mean_us']:.0f} us")
    return table


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items() if share >= LEAST_SHARE)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None, digits: int = 1) -> str:
    return "none in this time" if value is None else f"{value:.{digits}f}"
