"""A router's connection to one attention worker: one stream for all of its requests.

Everything here belongs to one event loop. gRPC errors stop here: a call raises PeerLost or PeerTimeout, and the
requests on a stream that breaks get an output with finish_reason "error" that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from afd.credentials import OPEN, Credentials
from afd.errors import PeerLost, PeerTimeout
from afd.rpc import attention_pb2 as pb
from afd.rpc import secure
from afd.rpc.attention_pb2_grpc import AttentionStub
from afd.rpc.convert import AttentionStatus, output_from_proto, request_to_proto, status_from_proto
from afd.types import GenerateOutput, GenerateRequest, Refusal, SampledToken

log = logging.getLogger(__name__)

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 256 << 20),  # one message carries a whole step, logprobs included
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # workers are never behind the user's web proxy
    ("grpc.use_local_subchannel_pool", 1),  # a reconnect does not inherit an older channel's back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
)

_MAX_HANDLE = 2**32 - 1
_FAREWELL_S = 0.5  # how long a worker may take to end its side of a stream that this side has ended


# What a step brings to a request: an ordinary token, as (request_id, token_id), or anything at all as an output.
Arrival = tuple[str, int] | GenerateOutput


class Inbox:
    """Where outputs of one or several requests wait for their reader. One reader; everything on one event loop.

    A task switch for every token of every stream costs more than what is done with the token. So the reader may set
    `shortcut`, which is called with an ordinary token at once, instead of waking the reader, whenever the reader waits
    here and thus has dealt with all that came before. What it returns, if anything, the reader awaits before it goes
    on; what it raises is raised to the reader.
    """

    def __init__(self) -> None:
        self.shortcut: Callable[[str, int], Awaitable[None] | None] | None = None
        self._arrivals: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None
        self._unfinished: Awaitable[None] | None = None

    def put(self, arrival: Arrival) -> None:
        """Never blocks: what one request can bring is bounded by its max_tokens."""
        self._arrivals.append(arrival)
        self._wake()

    def put_token(self, request_id: str, token_id: int) -> None:
        """The same for an ordinary token."""
        if self.shortcut is None or self._waiter is None:
            self.put((request_id, token_id))
            return
        try:
            self._unfinished = self.shortcut(request_id, token_id)
        except Exception as error:
            self._unfinished = _raise(error)
        if self._unfinished is not None:
            self._wake()

    async def arrivals(self) -> list[Arrival]:
        """Everything that came since it was last taken, in order; waits for at least one thing."""
        while not self._arrivals:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            if self._unfinished is not None:
                unfinished, self._unfinished = self._unfinished, None
                await unfinished
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    async def take(self) -> list[GenerateOutput]:
        """The same, with every ordinary token as an output."""
        return [as_output(arrival) for arrival in await self.arrivals()]

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


async def _raise(error: Exception) -> None:
    raise error


def as_output(arrival: Arrival) -> GenerateOutput:
    """An arrival as the worker's engine said it."""
    if isinstance(arrival, tuple):
        request_id, token_id = arrival
        return GenerateOutput(request_id, (SampledToken(token_id),))
    return arrival


@dataclass(slots=True)
class _Entry:
    request_id: str
    handle: int  # of this connection, for the columns of its steps
    inbox: Inbox
    num_tokens: int  # prompt and answer so far


class AttentionClient:
    """The service of one attention worker. Made by `connect`; `close` it.

    `peer` names the worker in errors, for example "attention worker 0". `lost` is "" while the stream stands, then one
    sentence; a lost client stays lost. `heard_at` is the loop time of the worker's last sign of progress.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        address: str,
        peer: str,
        on_lost: Callable[[], None],
        metadata: secure.Metadata = (),
    ) -> None:
        self.address = address
        self.peer = peer
        self.lost = ""
        self.num_tokens = 0  # prompt and answer tokens of all requests in flight
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        self._on_lost = on_lost
        self._entries: dict[str, _Entry] = {}
        self._by_handle: dict[int, _Entry] = {}
        self._last_handle = 0
        self._outgoing: asyncio.Queue[pb.RouterMessage] = asyncio.Queue()
        self._channel = channel
        self._stub = AttentionStub(channel)  # type: ignore[no-untyped-call]  # generated code has no types
        self._metadata = metadata
        self._call = self._stub.Serve(metadata=metadata)
        self._reader = self._loop.create_task(self._read())
        self._writer = self._loop.create_task(self._write())

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        peer: str,
        deadline_s: float,
        on_lost: Callable[[], None] = lambda: None,
        credentials: Credentials = OPEN,
    ) -> AttentionClient:
        """Opens the stream to host:port `address`. `on_lost` is called once, when the stream breaks.

        Raises PeerTimeout when nothing accepts the connection within `deadline_s` seconds, ConfigError for bad
        certificates.
        """
        channel = secure.aio_channel(address, credentials, _CHANNEL_OPTIONS)
        try:
            await asyncio.wait_for(channel.channel_ready(), deadline_s)
        except asyncio.TimeoutError:
            await channel.close()
            message = f"{peer} at {address} did not accept a connection within {deadline_s:g} s"
            raise PeerTimeout(message, peer=peer) from None
        except BaseException:
            await channel.close()
            raise
        return cls(channel, address, peer, on_lost, secure.metadata(credentials))

    @property
    def num_requests(self) -> int:
        """Requests in flight on this stream."""
        return len(self._entries)

    def submit(self, request: GenerateRequest, inbox: Inbox) -> None:
        """Sends `request`; its outputs go to `inbox`, the last of them with finish_reason set, whatever happens.

        Raises PeerLost when the stream is already gone. Does not block.
        """
        assert asyncio.get_running_loop() is self._loop, "an AttentionClient belongs to the loop that connected it"
        assert request.request_id not in self._entries, f"request {request.request_id} is already in flight"
        if self.lost:
            raise PeerLost(self.lost, peer=self.peer)
        if not self._entries:
            self.heard_at = self._loop.time()  # an idle worker owes no sign of life
        handle = self._new_handle()
        entry = _Entry(request.request_id, handle, inbox, request.num_tokens)
        self._entries[request.request_id] = self._by_handle[handle] = entry
        self.num_tokens += request.num_tokens
        self._outgoing.put_nowait(pb.RouterMessage(submit=request_to_proto(request, handle)))

    def cancel(self, request_id: str) -> None:
        """Tells the worker to forget the request; no output of it arrives after this. Unknown ids are ignored."""
        if self._forget(request_id) and not self.lost:
            self._outgoing.put_nowait(pb.RouterMessage(cancel=pb.Cancel(request_id=request_id)))

    async def status(self, *, deadline_s: float) -> AttentionStatus:
        """Raises PeerTimeout, PeerLost or Unauthenticated."""
        try:
            reply = await self._stub.Status(pb.StatusRequest(), timeout=deadline_s, metadata=self._metadata)
            return status_from_proto(reply)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                message = f"{self.peer} at {self.address} did not answer Status within {deadline_s:g} s"
                raise PeerTimeout(message, peer=self.peer) from None
            raise secure.lost(error, self.peer, self.address) from None
        except grpc.aio.UsageError:
            raise PeerLost(f"the connection to {self.peer} was closed", peer=self.peer) from None

    def fail(self, sentence: str, refused: Refusal = "unavailable") -> None:
        """Ends every request in flight with an error output saying `sentence`, and takes no more. `refused` "": not
        for another worker to take either. Idempotent."""
        if self.lost:
            return
        self.lost = sentence
        self._end_all(sentence, refused)
        self._on_lost()

    def let_go(self, sentence: str) -> None:
        """Ends every request in flight with an error output saying `sentence`, for another worker to take, and tells
        this one to forget them. The stream stands."""
        for request_id in self._end_all(sentence, "unavailable"):
            self._outgoing.put_nowait(pb.RouterMessage(cancel=pb.Cancel(request_id=request_id)))

    async def close(self) -> None:
        """Ends the stream, upon which the worker cancels what it carried. Requests in flight are told."""
        self.fail(f"the connection to {self.peer} was closed")
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # already broken
            await self._call.done_writing()
        await asyncio.wait({self._reader}, timeout=_FAREWELL_S)
        self._call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def _read(self) -> None:
        reason = "it closed the stream"
        try:
            async for step in self._call:
                self.heard_at = self._loop.time()
                self._deliver_tokens(step)
                for message in step.outputs:
                    self._deliver(output_from_proto(message))
        except grpc.aio.AioRpcError as error:
            reason = _reason(error)
        except asyncio.CancelledError:
            reason = "the stream was cancelled"
        except Exception as error:
            log.exception("%s sent what this router cannot read", self.peer)
            reason = f"it sent what this router cannot read ({error!r})"
        self.fail(f"{self.peer} at {self.address} was lost: {reason}")

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader learns of it too, and knows why

    def _deliver_tokens(self, step: pb.StepOutputs) -> None:
        by_handle = self._by_handle
        for handle, token_id in zip(step.handles[:], step.token_ids[:], strict=True):
            entry = by_handle.get(handle)
            if entry is not None:  # else it was cancelled while this was on its way
                entry.num_tokens += 1
                self.num_tokens += 1
                entry.inbox.put_token(entry.request_id, token_id)

    def _deliver(self, output: GenerateOutput) -> None:
        entry = self._entries.get(output.request_id)
        if entry is None:
            return  # cancelled while this was on its way
        entry.num_tokens += len(output.tokens)
        self.num_tokens += len(output.tokens)
        if output.finish_reason is not None:
            self._forget(output.request_id)
        entry.inbox.put(output)

    def _end_all(self, sentence: str, refused: Refusal) -> list[str]:
        """Which requests there were."""
        entries, self._entries = self._entries, {}
        self._by_handle.clear()
        self.num_tokens = 0
        for request_id, entry in entries.items():
            entry.inbox.put(GenerateOutput(request_id, finish_reason="error", error=sentence, refused=refused))
        return list(entries)

    def _forget(self, request_id: str) -> bool:
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return False
        del self._by_handle[entry.handle]
        self.num_tokens -= entry.num_tokens
        return True

    def _new_handle(self) -> int:
        """From 1 to 2**32 - 1, and again from 1."""
        while True:
            self._last_handle = self._last_handle % _MAX_HANDLE + 1
            if self._last_handle not in self._by_handle:
                return self._last_handle


def _reason(error: grpc.aio.AioRpcError) -> str:
    details = error.details() or "no details"
    return f"{details} ({error.code().name})"
