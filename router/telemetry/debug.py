"""What is for people who look into a running server: where its workers' time goes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import orjson
from starlette.requests import Request
from starlette.responses import Response

from afd.errors import AfdError, RequestError
from afd.pipeline import analysis, perfetto, summary, timeline
from router.http import errors

# The last so many seconds of every worker's timeline, with at most so many events over all of them.
Timelines = Callable[[float, int], timeline.Timelines]

SECONDS = 5.0
MIN_SECONDS = 0.1  # in less, the workers' timelines may have no moment in common
MAX_SECONDS = 60.0
MAX_EVENTS = 120_000  # some 35 MB of JSON, and a few seconds of this process to write it


def nobody(_seconds: float, _max_events: int) -> timeline.Timelines:
    """The timelines of a router that has no cluster behind it."""
    return timeline.Timelines(())


class Debug:
    """Belongs to the event loop that serves it. Looks once at a time: it takes memory and the interpreter."""

    def __init__(self, timelines: Timelines) -> None:
        self._timelines = timelines
        self._looking = asyncio.Lock()

    async def timeline(self, request: Request) -> Response:
        """GET /debug/timeline?seconds=5&format=trace: what all workers did in the last seconds, as far as their rings
        go back, for Perfetto or chrome://tracing; format=summary: what it adds up to (afd.pipeline.summary.Summary).
        """
        try:
            seconds, write = _seconds(request.query_params.get("seconds")), _writer(request.query_params.get("format"))
            async with self._looking:
                return await asyncio.to_thread(self._look, seconds, write)
        except AfdError as error:
            return errors.response(error)

    def _look(self, seconds: float, write: Callable[[analysis.Picture], object]) -> Response:
        picture = analysis.picture(self._timelines(seconds, MAX_EVENTS), asked_s=seconds)
        return errors.json_response(200, orjson.dumps(write(picture)))


def _seconds(text: str | None) -> float:
    try:
        seconds = SECONDS if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise RequestError(
            f"seconds is {text!r}; it must be a number from {MIN_SECONDS:g} to {MAX_SECONDS:g}", param="seconds"
        )
    return seconds


def _writer(name: str | None) -> Callable[[analysis.Picture], object]:
    writers: dict[str, Callable[[analysis.Picture], object]] = {
        "trace": perfetto.document,
        "summary": summary.as_json,
    }
    if (name or "trace") not in writers:
        raise RequestError(f"format is {name!r}; known are {', '.join(writers)}", param="format")
    return writers[name or "trace"]
