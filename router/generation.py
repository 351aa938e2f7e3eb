"""A job as an HTTP answer: streamed or whole, cancelled when the client hangs up, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from afd.errors import AfdError
from router.answers.best import best
from router.answers.choice import Delta
from router.http import errors, exchange
from router.openai.responses import Shape, event
from router.relay.job import Job
from router.relay.relay import Relay
from router.relay.stream import Stream
from router.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

SERVER_SEND = "afd.server_send"  # where a scope has the server's own `send`, past all that stands before a route

T = TypeVar("T")


class Generation(Response):
    """Runs `job` while it is sent. Until the first output is there, an error still has its own HTTP status; after
    that it is an event in the stream, which then ends without [DONE]."""

    def __init__(self, relay: Relay, metrics: Metrics, job: Job, shape: Shape, *, stream: bool) -> None:
        self._relay = relay
        self._metrics = metrics
        self._job = job
        self._shape = shape
        self._write = self._stream if stream else self._whole
        self._started = False
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"} if stream else {}
        super().__init__(
            status_code=200,
            headers=headers,
            media_type="text/event-stream" if stream else "application/json",
        )
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._exchange = exchange.of(scope)
        self._start_send = send
        try:
            await _while_connected(receive, self._run(scope.get(SERVER_SEND, send)))
        except ClientDisconnect:
            log.info("%s: the client left", self._job.job_id)
        except Exception as error:
            if isinstance(error, AfdError):
                log.info("%s: %s", self._job.job_id, error)
            else:
                log.exception("%s failed", self._job.job_id)
            self._exchange.error = type(error).__name__
            if self._started:  # with status 200, so that nobody else sees an error in it
                self._metrics.http_errors.labels(str(errors.status_of(error))).inc()
                await self._send(send, event(errors.body(error)), more=False)
            else:
                await errors.response(error)(scope, receive, send)

    async def _run(self, send: Send) -> None:
        async with self._relay.open(self._job) as stream:
            try:
                await self._write(stream, send)
            finally:
                stream.tell(self._exchange)

    async def _stream(self, stream: Stream, send: Send) -> None:
        deltas = await stream.next()
        await self._start()
        opening = self._shape.opening()
        stream.on_delta(lambda delta: self._say(send, delta))
        while deltas:
            content = opening + self._shape.chunks(deltas)
            if content:
                await self._send(send, content, more=True)
            opening = b""
            deltas = await stream.next()
        await self._send(send, self._shape.closing(stream.num_generated, stream.num_cached), more=False)

    def _say(self, send: Send, delta: Delta) -> Awaitable[None] | None:
        """Sends without a task of its own, unless the client is slow to read; then what returns has to be awaited."""
        content = self._shape.chunks((delta,))
        return at_once(self._send(send, content, more=True)) if content else None

    async def _whole(self, stream: Stream, send: Send) -> None:
        answers = [Delta(index) for index in range(len(self._job.prompts) * self._job.n)]
        texts: list[list[str]] = [[] for _ in answers]
        reasonings: list[list[str]] = [[] for _ in answers]
        while deltas := await stream.next():
            for delta in deltas:
                answer = answers[delta.index]
                texts[delta.index].append(delta.text)
                reasonings[delta.index].append(delta.reasoning)
                answer.calls += delta.calls
                answer.tokens += delta.tokens
                answer.offsets += delta.offsets
                answer.prompt += delta.prompt
                answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
        for answer, pieces, thoughts in zip(answers, texts, reasonings, strict=True):
            answer.text, answer.reasoning = "".join(pieces), "".join(thoughts)
        content = self._shape.whole(best(answers, self._job), stream.num_generated, stream.num_cached)
        self.raw_headers.append((b"content-length", str(len(content)).encode()))
        await self._start()
        await self._send(send, content, more=False)

    async def _start(self) -> None:
        """Once a request, and so by the long way: whoever stands before the route adds headers."""
        self._started = True
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._start_send(start)

    @staticmethod
    async def _send(send: Send, content: bytes, *, more: bool) -> None:
        await send({"type": "http.response.body", "body": content, "more_body": more})


def at_once(work: Coroutine[object, None, None]) -> Awaitable[None] | None:
    """Runs `work` up to the first thing it waits for; None when it is done by then, else the rest, to be awaited."""
    try:
        awaited = work.send(None)
    except StopIteration:
        return None
    return _rest(work, awaited)


@types.coroutine
def _rest(work: Coroutine[object, None, None], awaited: object) -> Generator[object, None, None]:
    yield awaited
    yield from work


async def _while_connected(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The result of `work`; when the client hangs up first, `work` is cancelled and ClientDisconnect raised."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
