"""HTTP/1.1 on a bare connection, many times as fast as a real client, and free to say what no client would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connection:
    """Raises asyncio.IncompleteReadError or OSError where the server hangs up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, path: str, body: bytes, *, more: bytes = b"") -> None:
        """A POST; `more` are further header lines, each with its end."""
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.writer.write(head.encode() + more + b"\r\n" + body)

    async def answer(self) -> Answer:
        """The next answer, read to its end."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        answer = Answer(int(head[0].split(" ")[1]), {name.lower(): value for name, value in pairs})
        if answer.headers.get("transfer-encoding") == "chunked":
            answer.body = b"".join([chunk async for chunk in self._chunks()])
        else:
            answer.body = await self.reader.readexactly(int(answer.headers.get("content-length", 0)))
        return answer

    async def ask(self, path: str, body: bytes) -> Answer:
        self.send(path, body)
        return await self.answer()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Connection]:
    """Closed, without manners, when the block ends."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


async def at_once(work: Callable[[Connection, T], Awaitable[U]], items: list[T], url: str, num: int) -> list[U]:
    """What `work` gives for each item, in order; over `num` connections that are kept."""
    results: dict[int, U] = {}
    waiting = iter(enumerate(items))

    async def run() -> None:
        async with connection(url) as kept:
            for index, item in waiting:
                results[index] = await work(kept, item)

    await asyncio.gather(*(run() for _ in range(num)))
    return [results[index] for index in range(len(items))]
