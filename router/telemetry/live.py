"""What somebody who watches a running server wants once a second: the status page's and `afd top`'s data."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import orjson
from starlette.responses import Response

from afd.errors import AfdError
from afd.pipeline import analysis, lanes, summary
from router.gateway import Gateway
from router.telemetry.debug import Timelines

Json = dict[str, object]

# A look at the timelines costs this process some 7 us an event, and the tokens of others wait for the interpreter.
WINDOW_S = 0.2
MAX_EVENTS = 2_000  # over all workers; where they make more in WINDOW_S, the window is shorter
LOOK_S = 1.0  # longest wait for the timelines; the rest is told without them
FRESH_S = 0.5  # how old an answer may be: those who watch at the same time share one


@dataclass(frozen=True, slots=True)
class _Look:
    """The timelines of one moment, or one sentence on why there are none."""

    problem: str
    summary: Json | None = None  # afd.pipeline.summary
    lanes: Json | None = None  # afd.pipeline.lanes


class Live:
    """Belongs to the event loop that serves it."""

    def __init__(self, gateway: Gateway, timelines: Timelines) -> None:
        self._gateway = gateway
        self._timelines = timelines
        self._asked = asyncio.Lock()
        self._looking: asyncio.Task[_Look] | None = None
        self._answer = b""
        self._answered_s = float("-inf")  # time.monotonic

    async def pipeline(self) -> Response:
        """GET /status/pipeline: GET /status, counts since the router's start, and what the workers have done in the
        last tenths of a second. Rates are differences of two answers, over that of their `at_s`."""
        async with self._asked:
            if time.monotonic() - self._answered_s > FRESH_S:
                self._answer = orjson.dumps(await self._see())
                self._answered_s = time.monotonic()
        return Response(self._answer, media_type="application/json", headers={"cache-control": "no-store"})

    async def _see(self) -> Json:
        seen, look = await asyncio.gather(self._gateway.seen(), self._look())
        return seen | {
            "at_s": time.monotonic(),
            "counted": self._gateway.counted() | self._experts(),
            "timeline": look.summary,
            "timeline_problem": look.problem,
            "lanes": look.lanes,
        }

    def _experts(self) -> Json:
        totals = [worker.totals for worker in self._gateway.pool.view.workers if worker.totals is not None]
        return {
            "expert_calls": sum(total.expert_calls for total in totals),
            "expert_tokens": sum(total.expert_tokens for total in totals),
        }

    async def _look(self) -> _Look:
        """A new look, or that of an earlier question which took longer than LOOK_S."""
        if self._looking is None:
            self._looking = asyncio.create_task(asyncio.to_thread(self._collect))
        looking = self._looking
        await asyncio.wait([looking], timeout=LOOK_S)
        if not looking.done():
            return _Look(f"the workers' timelines did not come within {LOOK_S:g} s")
        self._looking = None
        return looking.result()

    def _collect(self) -> _Look:
        try:
            picture = analysis.picture(self._timelines(WINDOW_S, MAX_EVENTS), asked_s=WINDOW_S)
        except AfdError as error:
            return _Look(str(error))
        return _Look("; ".join(picture.missing), summary.as_json(picture), lanes.as_json(picture))
