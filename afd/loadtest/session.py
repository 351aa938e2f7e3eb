"""One run from its beginning to its figures, and a sweep of them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from afd.loadtest import measure, sweep, window
from afd.loadtest.busy import Samples, Watch
from afd.loadtest.drive import Driver, Load, Run
from afd.loadtest.measure import Measured
from afd.loadtest.plan import Plan

TELL_S = 0.5

Tell = Callable[[Driver], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run and what it adds up to. `samples` are empty where the server does not say what its workers do; `stopped`:
    Ctrl-C ended it early."""

    run: Run
    measured: Measured
    samples: Samples
    stopped: bool


async def once(plan: Plan, load: Load, *, watch: bool, tell: Tell) -> Outcome:
    """Runs `load`. `tell` is called now and then. Ctrl-C ends it early, with figures so far."""
    driver = Driver(plan.target, plan.asks(), load)
    watcher = Watch(plan.target, time.monotonic() - driver.now_s)
    telling = asyncio.create_task(_telling(driver, tell))
    watching = [asyncio.create_task(watcher.run())] if watch else []
    try:
        with _interrupt(driver.stop) as stopped:
            run = await driver.drive()
        watcher.stop()
        await asyncio.gather(*watching)
    finally:
        for task in (telling, *watching):
            task.cancel()
        await asyncio.gather(telling, *watching, return_exceptions=True)
    tell(driver)
    measured = measure.measure(run, window.find(run, plan.warm_up), plan.slo)
    return Outcome(run, measured, watcher.samples, stopped.is_set())


async def search(
    plan: Plan, *, watch: bool, tell: Tell, tried: Callable[[sweep.Probe], None]
) -> tuple[sweep.Found, Outcome]:
    """Sweeps; the outcome is that of the highest rate that meets the objectives, or of the last tried where none does.
    `tried` is told of every rate. Raises KeyboardInterrupt at Ctrl-C."""
    outcomes: dict[float, Outcome] = {}

    async def probe(rate: float) -> sweep.Probe:
        outcomes[rate] = outcome = await once(plan, plan.load(rate), watch=watch, tell=tell)
        if outcome.stopped:
            raise KeyboardInterrupt
        goodput = outcome.measured.goodput
        assert goodput is not None, "a sweep without objectives"
        result = sweep.Probe(rate, goodput.share, goodput.share >= plan.options.slo_share)
        tried(result)
        return result

    found = await sweep.highest(probe, plan.first_rate)
    return found, outcomes[found.probes[-1].rate if found.rate is None else found.rate]


async def _telling(driver: Driver, tell: Tell) -> None:
    while True:
        tell(driver)
        await asyncio.sleep(TELL_S)


@contextmanager
def _interrupt(stop: Callable[[], None]) -> Iterator[asyncio.Event]:
    """Ctrl-C calls `stop`; the event says that it did."""
    loop, pressed = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        pressed.set()
        stop()

    loop.add_signal_handler(signal.SIGINT, end)
    try:
        yield pressed
    finally:
        loop.remove_signal_handler(signal.SIGINT)
