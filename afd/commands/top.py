"""`afd top`: a running server's workers and pipeline, drawn again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from afd.commands.frame import Frame, Json, Latency, Row, Side, frame
from afd.commands.http import client, fetch, foreign
from afd.commands.status import COLOURS
from afd.errors import AfdError, ConfigError

PATH = "/status/pipeline"
LEAST_S = 0.6  # the router does not look more often
SILENCE_S = 5.0  # longest wait for an answer
LEAST_SHARE = 0.005  # smaller shares of the window are not worth a word
NONE = "none yet"
WIDE = 100  # terminals of at least so many columns have longer bars


def top(url: str, interval_s: float, once: bool) -> None:
    """Shows GET /status/pipeline until Ctrl-C, or the first interval alone. A server that goes away is waited for; one
    that is not there from the start raises Unavailable, RequestError where it refuses."""
    if not interval_s >= LEAST_S:
        raise ConfigError(f"--interval is {interval_s:g} s; it must be at least {LEAST_S:g} s")
    console = Console(highlight=False)
    if not once and not console.is_terminal:
        raise ConfigError("afd top draws on a terminal, and this is none; --once prints one frame")
    with client(url, SILENCE_S) as session:
        first = fetch(session, PATH)
    shown = _read(url, first, first)
    if once:
        time.sleep(interval_s)
        with client(url, SILENCE_S) as session:
            console.print(_draw(_read(url, first, fetch(session, PATH)), console.width))
        return
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(_draw(shown, console.width), refresh=True)
        for answer in _frames(url, first, interval_s):
            shown, trouble = (shown, answer) if isinstance(answer, str) else (answer, "")
            live.update(_draw(shown, console.width, trouble), refresh=True)


def _frames(url: str, before: Json, interval_s: float) -> Iterator[Frame | str]:
    """A frame or one sentence of trouble after every interval, for ever."""
    while True:
        time.sleep(interval_s)
        try:
            with client(url, SILENCE_S) as session:
                now = fetch(session, PATH)
            yield _read(url, before, now)
            before = now
        except AfdError as error:
            yield str(error)


def _read(url: str, before: Json, now: Json) -> Frame:
    try:
        return frame(before, now)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise foreign(url) from error


def _draw(shown: Frame, width: int, trouble: str = "") -> RenderableType:
    """The whole screen. `trouble`: why nothing newer is shown."""
    lines: list[RenderableType] = [Text(shown.heading, "bold")]
    if trouble:
        lines.append(Text(f"{trouble}; what is below is old, trying again", "bold red"))
    lines += [Text(sentence, "red") for sentence in shown.problems]
    bar = 12 if width >= WIDE else 6
    return Group(*lines, Text(), _workers(shown.rows, bar), Text(), _figures(shown), Text(), _bubbles(shown, bar))


def _workers(rows: tuple[Row, ...], bar: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("worker", "state", "busy", "KV use"):
        table.add_column(heading, no_wrap=True)
    for heading in ("run", "wait", "tokens/s", "calls/s"):
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            Text(row.state, COLOURS.get(row.state, "yellow")),
            _gauge(row.busy, bar, "blue"),
            _gauge(row.kv_share, bar, "green"),
            *("" if value is None else str(value) for value in (row.running, row.waiting)),
            *("" if value is None else f"{value:.0f}" for value in (row.tokens_per_s, row.calls_per_s)),
        )
    return table


def _gauge(share: float | None, bar: int, colour: str) -> RenderableType:
    if share is None:
        return ""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(
        ProgressBar(total=1.0, completed=share, width=bar, complete_style=colour, finished_style=colour),
        f"{_percent(share):>5}",
    )
    return grid


def _figures(shown: Frame) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    waiting = f"{shown.waiting} waiting, {shown.waiting_tokens} prompt tokens to compute"
    for name, value in (
        ("tokens per second", _number(shown.tokens_per_s, 0)),
        ("requests", f"{shown.running} running, {waiting}"),
        ("time to first token", _times(shown.first_token)),
        ("time between tokens", _times(shown.inter_token)),
        (
            "tokens per FFN call",
            f"{_number(shown.tokens_per_ffn_call)}, per expert call {_number(shown.tokens_per_expert_call)}",
        ),
        ("wire bytes per token", _number(shown.wire_bytes_per_token, 0)),
        ("pipeline efficiency", NONE if shown.efficiency is None else _percent(shown.efficiency)),
    ):
        table.add_row(Text(name, "dim"), value)
    return table


def _bubbles(shown: Frame, bar: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for side in shown.sides:
        table.add_row(side.role, _gauge(side.busy, bar, "blue"), Text(_waits(side)))
    if shown.window_s is not None:
        table.add_row(Text("shares of", "dim"), Text(f"{1000 * shown.window_s:.0f} ms", "dim"))
    return table


def _waits(side: Side) -> str:
    causes = [f"{name} {_percent(share)}" for name, share in side.bubbles.items() if share >= LEAST_SHARE]
    return f"waits: {', '.join(causes) or 'never'}"


def _times(latency: Latency) -> str:
    if latency.p50 is None or latency.p95 is None:
        return NONE
    return f"p50 {1000 * latency.p50:.1f} ms, p95 {1000 * latency.p95:.1f} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"
