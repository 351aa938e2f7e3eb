"""What `afd bench` shows: progress while it runs, on standard error, and its tables at the end."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from afd.loadtest.drive import Driver
from afd.loadtest.measure import percentile
from afd.loadtest.result import Result
from afd.loadtest.sweep import Probe

_LOOK_BACK = 10  # tellings that the current rate is taken over, and
_LATEST = 200  # requests that current latencies are


class Progress:
    """One line, told anew now and then; nothing where nobody watches. Rates tried by a sweep stay above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._seen: deque[tuple[float, int]] = deque(maxlen=_LOOK_BACK)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def tell(self, driver: Driver) -> None:
        if self._console.is_terminal:
            self._live.update(self._line(driver), refresh=True)

    def tried(self, probe: Probe) -> None:
        self._seen.clear()
        verdict = "met" if probe.met else "not met"
        self._console.print(f"{probe.rate:.4g} requests/s: {100 * probe.share:.1f} % within objectives, {verdict}")

    def _line(self, driver: Driver) -> Text:
        self._seen.append((driver.now_s, driver.events))
        (before_s, before), (now_s, now) = self._seen[0], self._seen[-1]
        rate = (now - before) / (now_s - before_s) if now_s > before_s else 0.0
        records = driver.run.records
        over = len(records) - driver.in_flight
        latest = [record for record in records[-_LATEST:] if record.ok]
        failed = sum(record.status not in ("", "ok") for record in records)
        line = Text(f"{driver.now_s:6.1f} s  {over} ended, {driver.in_flight} in flight  {rate:7.1f} tokens/s")
        for name, values in (
            ("TTFT", sorted(r.ttft_s for r in latest if r.ttft_s is not None)),
            ("TPOT", sorted(r.tpot_s for r in latest if r.tpot_s is not None)),
        ):
            if values:
                line.append(f"  {name} {1e3 * percentile(values, 50):.0f} ms")
        if failed:
            line.append(f"  {failed} failed", style="red")
        return line


def show(result: Result) -> None:
    """Prints the tables."""
    console = Console(highlight=False)
    for table in (_facts(result), _latencies(result), _costs(result)):
        if table is not None:
            console.print(table)


def _facts(result: Result) -> Table:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in (*result.setup.items(), *result.figures()):
        table.add_row(Text(name), Text(value, "red" if name == "errors" else ""))
    return table


def _latencies(result: Result) -> Table:
    table = Table(title="latency, ms")
    table.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99", "values"):
        table.add_column(name, justify="right")
    for name, spread in result.latencies().items():
        values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99)
        table.add_row(name, *(f"{1e3 * value:.2f}" for value in values), str(spread.count))
    return table


def _costs(result: Result) -> Table | None:
    if result.cost is None:
        return None
    caption = f"at ${result.cost.usd_per_hour:g} an hour" + (f"; {result.cost.note}" if result.cost.note else "")
    table = Table(title="USD per million output tokens", caption=Text(caption))
    table.add_column("")
    for name in ("measured", "in theory", "in theory, this batch"):
        table.add_column(name, justify="right")
    for row in result.costs():
        table.add_row(*row)
    return table
