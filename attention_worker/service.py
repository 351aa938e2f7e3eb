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
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from afd.credentials import OPEN, Credentials
from afd.errors import FrameError, RequestError, TransportError
from afd.rpc import attention_pb2 as pb
from afd.rpc import attention_pb2_grpc as pb_grpc
from afd.rpc import convert
from afd.rpc.secure import AioGuard, open_port, server_options
from afd.rpc.steps import StepWriter
from afd.types import GenerateOutput
from attention_worker.engine import Engine

log = logging.getLogger(__name__)

T = TypeVar("T")
Outputs = list[tuple[int, GenerateOutput]]
Status = Callable[[], pb.StatusReply]

_OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),  # a prompt of three million tokens
    ("grpc.max_send_message_length", -1),  # one message carries a whole step, logprobs included
    ("grpc.keepalive_time_ms", 10_000),  # a router whose machine is gone says nothing of it
    ("grpc.keepalive_timeout_ms", 5_000),
]


class Service:
    """Serves until `stop`. `publish` is the engine's; the engine itself comes later, with `serve_engine`, since it
    needs `publish` to be built. A router that takes nothing of what it is sent for `deadline_s` seconds is cut off."""

    def __init__(self, status: Status, bind: str, credentials: Credentials = OPEN, deadline_s: float = 30.0) -> None:
        self._status = status
        self._bind = bind
        self._credentials = credentials
        self._deadline_s = deadline_s
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
        self._server = grpc.aio.server(
            interceptors=[AioGuard(self._credentials)], options=[*server_options(), *_OPTIONS]
        )
        pb_grpc.add_AttentionServicer_to_server(_Servicer(self, self._deadline_s), self._server)  # type: ignore[no-untyped-call]
        try:
            port = open_port(self._server, host, 0, self._credentials)
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
        """One router connection, from its first message to its end. Raises FrameError for bytes that are no message."""
        owner = next(self._owners)
        queue = self._queues[owner] = asyncio.Queue()
        writer = StepWriter()
        reader = asyncio.ensure_future(self._read(owner, messages, queue, writer))
        try:
            while True:
                outputs = await queue.get()
                if not outputs:
                    await reader  # raises what ended it
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
        except DecodeError as error:
            raise FrameError("the router sent bytes that are no RouterMessage") from error
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


class _Patience:
    """Cancels the task that made it when a message is not taken for `limit_s` seconds. It costs a message next to
    nothing, where a time-out of its own would cost a task. It counts its looks instead of reading the clock: a process
    that was stopped for a while must not blame its peer."""

    def __init__(self, limit_s: float) -> None:
        self.over = False
        self._quarter_s = limit_s / 4
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._waiting = False  # for gRPC to take a message
        self._looks = 0  # since it was given to it
        self._timer = self._loop.call_later(self._quarter_s, self._look)

    def __enter__(self) -> None:
        self._waiting, self._looks = True, 0

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        self._looks += 1
        if not self._waiting or self._looks <= 4:
            self._timer = self._loop.call_later(self._quarter_s, self._look)
        elif self._task is not None:
            self.over = self._task.cancel()


class _Servicer(pb_grpc.AttentionServicer):
    """gRPC's names for the above."""

    def __init__(self, service: Service, deadline_s: float) -> None:
        self._service = service
        self._deadline_s = deadline_s

    async def Serve(self, request_iterator: AsyncIterator[pb.RouterMessage], context: Any) -> None:
        patience = _Patience(self._deadline_s)
        try:
            async with contextlib.aclosing(self._service.serve_stream(request_iterator)) as steps:
                async for outputs in steps:
                    with patience:
                        await context.write(outputs)
        except FrameError as error:
            await self._end(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if not patience.over:
                raise
            sentence = f"the router took nothing for {self._deadline_s:g} s (transport.deadline_s)"
            await self._end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
        finally:
            patience.stop()

    async def _end(self, context: Any, code: grpc.StatusCode, sentence: str) -> None:
        log.warning("cut off %s: %s", context.peer(), sentence)
        await context.abort(code, sentence)

    async def Status(self, request: pb.StatusRequest, context: object) -> pb.StatusReply:  # noqa: ARG002
        return self._service.status_reply()
