"""The attention worker's gRPC door: one stream per router, one message a step for all of that router's requests.

An asyncio loop in a thread of its own serves the streams; the engine's thread hands it each step's outputs in one
call, so a step costs the engine one wake-up however many requests it moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import TypeVar

import grpc

from afd.errors import RequestError, TransportError
from afd.rpc import attention_pb2 as pb
from afd.rpc import attention_pb2_grpc as pb_grpc
from afd.rpc import convert
from afd.rpc.steps import StepWriter
from afd.types import GenerateOutput
from attention_worker.engine import Engine

log = logging.getLogger(__name__)

T = TypeVar("T")
Outputs = list[tuple[int, GenerateOutput]]
Status = Callable[[], pb.StatusReply]


class Service:
    """Serves until `stop`. `publish` is the engine's; the engine itself comes later, with `serve_engine`, since it
    needs `publish` to be built."""

    def __init__(self, status: Status, bind: str) -> None:
        self._status = status
        self._bind = bind
        self._engine: Engine | None = None
        self._queues: dict[int, asyncio.Queue[list[GenerateOutput]]] = {}
        self._owners = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="attention service", daemon=True)

    def start(self) -> str:
        """Starts the thread; returns the host:port that routers connect to. Raises TransportError."""
        self._thread.start()
        return self._call(self._start())

    def serve_engine(self, engine: Engine) -> None:
        """From now on requests are taken; before, they are refused."""
        self._engine = engine

    def publish(self, outputs: Outputs) -> None:
        """Called by the engine's thread, once a step."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def stop(self) -> None:
        """Ends all streams and the thread. Idempotent."""
        if self._thread.is_alive():
            self._call(self._server.stop(grace=0.5))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5.0)
            self._loop.close()

    def _call(self, coroutine: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10.0)

    async def _start(self) -> str:
        host = f"[{self._bind}]" if ":" in self._bind and "[" not in self._bind else self._bind  # IPv6
        self._server = grpc.aio.server()
        pb_grpc.add_AttentionServicer_to_server(_Servicer(self), self._server)  # type: ignore[no-untyped-call]
        try:
            port = self._server.add_insecure_port(f"{host}:0")
        except RuntimeError as error:
            raise TransportError(f"cannot listen on {self._bind} (transport.bind): {error}") from error
        await self._server.start()
        return f"{host}:{port}"

    def _deliver(self, outputs: Outputs) -> None:
        by_owner: dict[int, list[GenerateOutput]] = defaultdict(list)
        for owner, output in outputs:
            by_owner[owner].append(output)
        for owner, mine in by_owner.items():
            if owner in self._queues:
                self._queues[owner].put_nowait(mine)

    async def serve_stream(self, messages: AsyncIterator[pb.RouterMessage]) -> AsyncGenerator[pb.StepOutputs, None]:
        """One router connection, from its first message to its end."""
        owner = next(self._owners)
        queue = self._queues[owner] = asyncio.Queue()
        writer = StepWriter()
        reader = asyncio.ensure_future(self._read(owner, messages, queue, writer))
        try:
            while True:
                outputs = await queue.get()
                if not outputs:
                    return
                yield writer.write(outputs)
        finally:
            reader.cancel()
            del self._queues[owner]
            if self._engine is not None:
                self._engine.drop_owner(owner)

    async def _read(
        self,
        owner: int,
        messages: AsyncIterator[pb.RouterMessage],
        queue: asyncio.Queue[list[GenerateOutput]],
        writer: StepWriter,
    ) -> None:
        """Takes the router's messages in; an empty list in the queue says that there will be no more."""
        try:
            async for message in messages:
                refusal = self._take(owner, message, writer)
                if refusal is not None:
                    queue.put_nowait([refusal])
        finally:
            queue.put_nowait([])

    def _take(self, owner: int, message: pb.RouterMessage, writer: StepWriter) -> GenerateOutput | None:
        """Hands one message to the engine; the output that refuses it, if it cannot be."""
        if message.WhichOneof("kind") == "cancel":
            writer.closed(message.cancel.request_id)
            if self._engine is not None:
                self._engine.cancel(owner, message.cancel.request_id)
            return None
        request_id = message.submit.request_id
        if self._engine is None:
            starting = "the attention worker is still starting"
            return GenerateOutput(request_id, (), "error", error=starting, refused="unavailable")
        try:
            request = convert.request_from_proto(message.submit)
        except RequestError as error:
            return GenerateOutput(request_id, (), "error", error=str(error), client_error=True)
        writer.opened(request_id, message.submit.handle)
        self._engine.submit(owner, request)
        return None

    def status_reply(self) -> pb.StatusReply:
        return self._status()


class _Servicer(pb_grpc.AttentionServicer):
    """gRPC's names for the above. grpc.aio tells a streaming handler by its being an async generator itself."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Serve(
        self,
        request_iterator: AsyncIterator[pb.RouterMessage],
        context: object,  # noqa: ARG002
    ) -> AsyncIterator[pb.StepOutputs]:
        async with contextlib.aclosing(self._service.serve_stream(request_iterator)) as steps:
            async for outputs in steps:
                yield outputs

    async def Status(self, request: pb.StatusRequest, context: object) -> pb.StatusReply:  # noqa: ARG002
        return self._service.status_reply()
