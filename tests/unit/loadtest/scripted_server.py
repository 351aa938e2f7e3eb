"""A server of OpenAI's API that answers by script: so many tokens, so fast, and wrong where it is told to be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Script:
    """What POSTs are answered. `status` gives each one's, by its number; 200 is a stream."""

    first_s: float = 0.005
    step_s: float = 0.002
    status: Callable[[int], int] = lambda number: 200
    cut_after: int | None = None  # tokens; then the connection is closed
    error_after: int | None = None  # tokens; then an error is the next event
    usage: bool = True
    stall: bool = False  # no answer, ever
    keep_alive: bool = True
    whole: bool = False  # one JSON, no stream
    pieces: int = 0  # bytes written at a time; 0: events as they are
    get: dict[str, Callable[[], str]] = field(default_factory=dict)  # path: what gives the body
    bodies: list[dict[str, object]] = field(default_factory=list)
    connections: int = 0
    keys: set[str] = field(default_factory=set)  # what stood behind "bearer", in any request


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


class _Server:
    def __init__(self, script: Script) -> None:
        self._script = script

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._script.connections += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        method, path, _ = head.split("\r\n")[0].split()
        script = self._script
        script.keys |= {
            line.split("bearer ")[1] for line in head.split("\r\n") if line.startswith("authorization: bearer ")
        }
        if method == "get":
            body = script.get.get(path)
            self._plain(writer, 200 if body else 404, body() if body else "nothing here")
            return True
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        script.bodies.append(json.loads(await reader.readexactly(length)))
        request, status = script.bodies[-1], script.status(len(script.bodies) - 1)
        if script.stall:
            await asyncio.Event().wait()
        if status != 200 or script.whole:
            self._plain(writer, status, json.dumps({"error": {"message": f"refused with {status}"}}))
            return script.keep_alive
        return await self._stream(writer, request)

    async def _stream(self, writer: asyncio.StreamWriter, request: dict[str, object]) -> bool:
        script, chat = self._script, "messages" in request
        framing = "transfer-encoding: chunked" if script.keep_alive else "connection: close"
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{framing}\r\n\r\n".encode())
        if chat:
            self._send(writer, event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        tokens = int(str(request["max_tokens"]))
        for index in range(tokens):
            await asyncio.sleep(script.step_s if index else script.first_s)
            if script.cut_after == index:
                writer.close()
                return False
            if script.error_after == index:
                self._send(writer, event({"error": {"message": "the engine is gone"}}))
                break
            choice: dict[str, object] = {"index": 0, "finish_reason": "length" if index == tokens - 1 else None}
            choice |= {"delta": {"content": "word "}} if chat else {"text": "word "}
            self._send(writer, event({"choices": [choice]}))
        else:
            if script.usage:
                usage = {"prompt_tokens": 7, "completion_tokens": tokens}
                self._send(writer, event({"choices": [], "usage": usage}))
            self._send(writer, event(b"[DONE]"))
        if script.keep_alive:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return script.keep_alive

    def _send(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        size = self._script.pieces or len(content)
        for begin in range(0, len(content), size):
            piece = content[begin : begin + size]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._script.keep_alive else piece)

    @staticmethod
    def _plain(writer: asyncio.StreamWriter, status: int, body: str) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body.encode())


@contextlib.contextmanager
def serving(script: Script) -> Iterator[str]:
    """The server's URL, while it runs on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(_Server(script).connection, "127.0.0.1", 0)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.sleep(0)  # closed connections are told so in the loop's next round

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


if __name__ == "__main__":  # a process of its own: the seconds between two tokens, as argument
    models = json.dumps({"data": [{"id": "scripted"}]})
    with serving(Script(step_s=float(sys.argv[1]), get={"/v1/models": lambda: models})) as url:
        print(url, flush=True)
        sys.stdin.read()
