"""`afd status`: every worker of a running server, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from afd.commands.http import check, client

COLOURS = {"ready": "green", "lost": "red"}
COUNTERS = ("running", "waiting", "blocks_used", "blocks_total", "generated_tokens")


def status(url: str, as_json: bool) -> None:
    """Prints the router's GET /status. Raises Unavailable when nothing answers at `url`."""
    with client(url) as session:
        view: dict[str, Any] = check(session.get("/status")).json()
    if as_json:
        print(json.dumps(view, indent=2))
        return
    console = Console(highlight=False)
    console.print(f"{view['model']} as {view['topology']}, run {view['epoch']}", markup=False)
    if view["problem"]:
        console.print(view["problem"], style="red", markup=False)
    console.print(_table(view["workers"]))


def _table(workers: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("worker", "state", "pid", "node", "address"):
        table.add_column(heading, no_wrap=True)
    table.add_column("status")
    for worker in workers:
        status = worker.get("status") or {}
        counters = ", ".join(f"{k} {v}" for k, v in status.items() if k in COUNTERS)
        table.add_row(
            f"{worker['role']}_rank {worker['rank']}",
            f"[{COLOURS.get(worker['state'], 'yellow')}]{worker['state']}",
            str(worker["pid"] or ""),
            worker["node"],
            worker["address"],
            worker["message"] or counters,
        )
    return table
