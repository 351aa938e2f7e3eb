"""`afd status`: every worker of a running server, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from afd.commands.http import client, fetch, foreign

COLOURS = {"ready": "green", "lost": "red"}
COUNTERS = ("running", "waiting", "blocks_used", "blocks_total", "generated_tokens", "calls", "dispatches", "failures")


def status(url: str, as_json: bool) -> None:
    """Prints the router's GET /status. Raises Unavailable when nothing, or nobody of ours, answers at `url`."""
    with client(url) as session:
        view = fetch(session, "/status")
    try:
        table = _table(view["workers"])
        heading, problem = f"{view['model']} as {view['topology']}, run {view['epoch']}", str(view["problem"])
    except (KeyError, TypeError, AttributeError) as error:
        raise foreign(url) from error
    if as_json:
        print(json.dumps(view, indent=2))
        return
    console = Console(highlight=False)
    console.print(heading, markup=False)
    if problem:
        console.print(problem, style="red", markup=False)
    console.print(table)


def _table(workers: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("worker", "state", "pid", "node", "address"):
        table.add_column(heading, no_wrap=True)
    table.add_column("status")
    for worker in workers:
        status = worker.get("status") or {}
        counters = ", ".join(f"{k} {v}" for k, v in status.items() if k in COUNTERS)
        table.add_row(
            f"{worker['role']}_rank {worker['rank']}"
            + (f" replica {replica}" if (replica := worker.get("replica")) else ""),
            Text(str(worker["state"]), COLOURS.get(worker["state"], "yellow")),
            str(worker["pid"] or ""),
            Text(str(worker["node"])),
            Text(str(worker["address"])),
            Text(str(worker["message"] or counters)),  # not as markup: a worker says what it likes
        )
    return table
