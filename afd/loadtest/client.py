"""The client: HTTP/1.1 on asyncio's own protocols, for a load test must not be what it measures.

A token costs one wake-up, one parse by httptools and one of a small JSON: a few tens of microseconds, of which a
general client takes several times as many. Everything belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson

from afd.errors import ConfigError
from afd.loadtest.events import Answer
from afd.loadtest.record import CANCELLED, CUT, NO_CONNECTION, TIMEOUT, Record
from afd.loadtest.workload import Ask, Endpoint

CONNECT_S = 10.0
_PATHS: dict[str, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what they all ask for."""

    url: str  # without /v1
    model: str
    endpoint: Endpoint = "completions"
    api_key: str = ""
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0

    def body(self, ask: Ask) -> bytes:
        fields: dict[str, object] = {
            "model": self.model,
            "max_tokens": ask.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            fields["prompt"] = ask.prompt
        return orjson.dumps(fields)


class Client:
    """Sends requests over as many connections as are in flight, and keeps them for the next ones."""

    def __init__(self, target: Target, start_s: float) -> None:
        """Records' times count from `start_s` of time.monotonic. Raises ConfigError for a bad URL or key."""
        self.events = 0  # with text, over all answers so far
        self._target = target
        self._start_s = start_s
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        where = urlsplit(target.url)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise ConfigError(f"--url is {target.url!r}; it begins with http:// or https:// and a host")
        self._host, self._port = where.hostname, where.port or (443 if where.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if where.scheme == "https" else None
        self._head = _head(target, where.netloc.rpartition("@")[2], where.path.rstrip("/"))

    def now_s(self) -> float:
        return time.monotonic() - self._start_s  # uvloop's own clock has milliseconds

    async def send(self, ask: Ask, record: Record) -> None:
        """One request and its whole answer, told in `record`, whatever happens."""
        body = self._target.body(ask)
        content = b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
        record.sent_s = self.now_s()
        try:
            await self._exchange(content, record)
        except (TimeoutError, asyncio.TimeoutError):
            _fail(record, TIMEOUT, f"no whole answer in {self._target.timeout_s:g} s (--timeout)")
        except OSError as error:
            _fail(record, NO_CONNECTION, f"{self._host}:{self._port}: {error}")
        except asyncio.CancelledError:
            _fail(record, CANCELLED, "the run ended before the answer did")
            raise
        finally:
            record.end_s = self.now_s()

    def close(self) -> None:
        for connection in self._all.copy():
            connection.abort()

    async def _exchange(self, content: bytes, record: Record) -> None:
        while True:
            connection, used = await self._connection()
            timer = asyncio.get_running_loop().call_later(self._target.timeout_s, connection.fail, TimeoutError())
            try:
                await connection.exchange(content, Answer(record))
                return
            except ConnectionError as error:
                # A server may close a connection that was idle just as it is used again: then nobody saw the request.
                if not (used and connection.silent):
                    _fail(record, CUT, f"the connection broke: {error}")
                    return
            finally:
                timer.cancel()
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.abort()

    async def _connection(self) -> tuple[_Connection, bool]:
        """One that is free, and whether it has been used before."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection, True
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(lambda: _Connection(self), self._host, self._port, ssl=self._tls)
        try:
            _, connection = await asyncio.wait_for(opening, CONNECT_S)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise ConnectionError(f"no connection within {CONNECT_S:g} s") from error
        return connection, False

    def opened(self, connection: _Connection) -> None:
        self._all.add(connection)

    def closed(self, connection: _Connection) -> None:
        self._all.discard(connection)


class _Connection(asyncio.Protocol):
    """One exchange at a time. The methods named on_… are httptools' callbacks."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._fresh_parser()
        self.silent = True  # nothing of this exchange's answer has come
        self.reusable = False

    async def exchange(self, content: bytes, answer: Answer) -> None:
        """Raises ConnectionError when the connection ends first."""
        assert self._transport is not None, "an exchange before the connection was made"
        self._answer, self._ended = answer, asyncio.get_running_loop().create_future()
        self.silent, self.reusable = True, False
        self._fresh_parser()
        if self._transport.is_closing():
            raise ConnectionResetError("closed by the server")
        self._transport.write(content)
        await self._ended

    def fail(self, error: Exception) -> None:
        """Ends the exchange with `error`, and the connection with it."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
        self.abort()

    def abort(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by inheritance
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        self._at_s = self._client.now_s()
        self.silent = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(ConnectionError(f"no HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._client.closed(self)
        ended = self._ended
        if ended is not None and not ended.done() and not self._ends_with_connection():
            self.fail(ConnectionResetError(str(error or "closed by the server")))
        self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._streamed = value.lower().startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_body(self, body: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        if not self._streamed or self._parser.get_status_code() != 200:
            answer.refusal(body)
            return
        answer.stream(body, self._at_s)
        self._client.events += answer.new_events
        answer.new_events = 0

    def on_message_complete(self) -> None:
        self._complete(self._parser.should_keep_alive())

    def _complete(self, keep_alive: bool) -> None:
        status = self._parser.get_status_code()
        if self._answer is not None and self._ended is not None and not self._ended.done():
            self._answer.end(status, self._streamed and status == 200)
            self.reusable = keep_alive
            self._ended.set_result(None)

    def _ends_with_connection(self) -> bool:
        """Whether the answer was one that says by closing that it is whole; then it is now."""
        if self._framed or self._parser.get_status_code() == 0:
            return False
        self._complete(keep_alive=False)
        return True

    def _fresh_parser(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._streamed = self._framed = False
        self._at_s = 0.0


def _head(target: Target, netloc: str, prefix: str) -> bytes:
    """A request's head up to the value of content-length."""
    lines = [
        f"POST {prefix}{_PATHS[target.endpoint]} HTTP/1.1",
        f"host: {netloc}",
        "user-agent: afd-bench",
        "accept: text/event-stream",
        "content-type: application/json",
    ]
    if target.api_key:
        lines.append(f"authorization: Bearer {target.api_key}")
    head = "\r\n".join([*lines, "content-length: "])
    if not head.isascii() or head.count("\n") != len(lines):
        raise ConfigError("--url or --api-key holds characters that no HTTP header may hold")
    return head.encode()


def _fail(record: Record, status: str, error: str) -> None:
    record.status, record.error = status, error
