"""Drives the load: sends what the workload says when the arrivals say, and keeps what happened.

An open loop sends at times of its own, whatever the server does; a closed loop keeps a number of requests in flight.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from afd.loadtest.client import Client, Target
from afd.loadtest.record import Record
from afd.loadtest.workload import Ask

_AFTER_FAILURE_S = 0.1  # a closed loop's place rests so long: refusals at once must not burn all requests


@dataclass(frozen=True, slots=True)
class Load:
    """`due_s`: when requests are sent, in seconds since the beginning (an open loop; it may end); None: `concurrency`
    at a time. No more are sent after `requests` or `seconds`, whichever comes first; those in flight may finish."""

    due_s: Iterator[float] | None = None
    concurrency: int = 0
    requests: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Run:
    """What happened: a record for each request that was sent, in that order."""

    concurrency: int = 0  # 0: an open loop
    records: list[Record] = field(default_factory=list)
    sent_all_s: float = 0.0  # until then requests came as they should


class Driver:
    """One run, on the running event loop. `in_flight`, `events` and `run` may be looked at meanwhile."""

    def __init__(self, target: Target, asks: Iterator[Ask], load: Load) -> None:
        """Raises ConfigError for a target that cannot be."""
        self.run = Run(load.concurrency if load.due_s is None else 0)
        self.in_flight = 0
        self._client = Client(target, time.monotonic())
        self._asks = asks
        self._load = load
        self._tasks: set[asyncio.Task[object]] = set()
        self._over = asyncio.Event()
        self._stopped = False
        self._failure: BaseException | None = None

    @property
    def now_s(self) -> float:
        """Since the beginning."""
        return self._client.now_s()

    @property
    def events(self) -> int:
        """Pieces of text that have come, a token each as a rule."""
        return self._client.events

    async def drive(self) -> Run:
        """Sends everything and waits for the last answer."""
        if self._load.due_s is not None:
            self._spawn(self._open(self._load.due_s))
        else:
            for _ in range(self._load.concurrency):
                self._spawn(self._place())
        try:
            await self._over.wait()
        finally:
            self.stop()
            self._client.close()
        if self._failure is not None:
            raise self._failure
        return self.run

    def stop(self) -> None:
        """Sends no more and hangs up; `drive` returns soon."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    async def _open(self, due_s: Iterator[float]) -> None:
        seconds = math.inf if self._load.seconds is None else self._load.seconds
        for at_s in due_s:
            await asyncio.sleep(max(0.0, min(at_s, seconds) - self.now_s))
            ask = self._next() if at_s <= seconds else None
            if ask is None:
                break
            self._spawn(self._send(ask, at_s))
            self.run.sent_all_s = self.now_s
        self.run.sent_all_s = min(self.now_s, max(self.run.sent_all_s, seconds))

    async def _place(self) -> None:
        """One of those that are in flight at a time."""
        seconds = math.inf if self._load.seconds is None else self._load.seconds
        while self.now_s < seconds and (ask := self._next()) is not None:
            self.run.sent_all_s = self.now_s
            record = await self._send(ask, self.now_s)
            if not record.ok:
                await asyncio.sleep(_AFTER_FAILURE_S)

    def _next(self) -> Ask | None:
        if self._stopped or (self._load.requests is not None and len(self.run.records) >= self._load.requests):
            return None
        return next(self._asks, None)

    async def _send(self, ask: Ask, due_s: float) -> Record:
        record = Record(len(self.run.records), due_s, ask.input_tokens, ask.output_tokens)
        self.run.records.append(record)
        self.in_flight += 1
        try:
            await self._client.send(ask, record)
        finally:
            self.in_flight -= 1
        return record

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task: asyncio.Task[object] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = self._failure or failure
            self.stop()
        if not self._tasks:
            self._over.set()
