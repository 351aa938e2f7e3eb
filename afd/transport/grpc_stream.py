"""One gRPC stream per pair of workers: between hosts, and wherever there is no shared memory.

The messages are those of proto/afd/rpc/ffn.proto. The `frame` field is put together by hand (a tag, a length, the
frame) so that its bytes are copied once and not parsed, and used where gRPC put them. gRPC's own threads meet the
port's thread in two queues: an inbox that a selector can wait on, and an outbox.

Every hand-over between threads costs a wake-up and a turn at the interpreter's lock, so there are as few as gRPC's
public interface allows. What comes in is put into the inbox by the function that gRPC calls to deserialize it, in the
thread that read it off the socket; the thread that goes through the stream's iterator only asks for the next one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from afd.credentials import OPEN, Credentials
from afd.errors import PeerLost, PeerTimeout, TransportError
from afd.heap import keep_freed_memory
from afd.rpc import ffn_pb2
from afd.rpc.core import grpc
from afd.rpc.secure import SyncGuard, channel, lost, metadata, open_port, server_options
from afd.transport.base import Hello, Link, Listener
from afd.transport.binding import split_bind, why_not
from afd.transport.envelope import unwrap, wrap
from afd.transport.frame import Frame, Slot, decode, encode, peek
from afd.transport.handshake import answer, check_welcome, hello_packet
from afd.transport.mailbox import Mailbox, wait_readable
from afd.transport.shape import HEADER_BYTES

_log = logging.getLogger(__name__)

_METHOD = f"/{ffn_pb2.DESCRIPTOR.services_by_name['Ffn'].full_name}/Exchange"
_COPIED_BYTES = 256 * 1024  # frames up to this size are copied once more: that takes less than making new tensors
_ENVELOPE_BYTES = 1024  # room for tag and length, and for the handshake's messages
_MAX_STREAMS = 256  # one thread each
_HANDSHAKE_S = 5.0  # a client that says nothing for this long is shown out
_CLOSE_S = 1.0  # longest wait for the peer to see our end

_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # workers reach each other directly, whatever http_proxy says
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_send_message_length", -1),
]


def listen(expected: Hello, bind: str, credentials: Credentials = OPEN) -> GrpcListener:
    """A server on `bind`, an address (any free port) or address:port. Raises TransportError when it cannot bind, or
    would stand open there (afd.rpc.secure.open_port)."""
    keep_freed_memory()
    return GrpcListener(expected, bind, credentials)


def dial(address: str, hello: Hello, timeout_s: float, credentials: Credentials = OPEN) -> Link:
    """Connects to host:port and shakes hands within `timeout_s` seconds. Raises PeerLost, PeerTimeout,
    HandshakeRefused."""
    keep_freed_memory()
    link = _ClientLink(address, hello, credentials)
    try:
        link.shake_hands(timeout_s)
    except TransportError:
        link.close()
        raise
    return link


class _GrpcLink(Link):
    """What both ends have in common. `max_bytes` is the largest frame that may come."""

    def __init__(self, peer: str, hello: Hello, max_bytes: int) -> None:
        self.peer, self.hello = peer, hello
        self._max_bytes = max_bytes
        self._rooms = [memoryview(bytearray(min(max_bytes, _COPIED_BYTES))) for _ in range(hello.microbatches)]
        self._slots = [Slot(room) for room in self._rooms]
        self._inbox: Mailbox[bytes] = Mailbox()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None ends it

    def send(self, frame: Frame) -> None:
        if self._inbox.ended:
            raise PeerLost(f"{self.peer} is gone", peer=self.peer)
        if (waiting := self._outbox.qsize()) > self.hello.microbatches:  # who reads asks again only when answered
            self._cut()
            raise PeerLost(f"{self.peer} does not read: {waiting} frames wait for it", peer=self.peer)
        self._outbox.put(wrap(encode(frame)))

    def arrived(self, message: bytes) -> bytes:
        """Any thread, as gRPC's deserializer: takes in a message of the peer."""
        self._inbox.put(message)
        return message

    @abstractmethod
    def _cut(self) -> None:
        """Breaks the stream off: what is still to be sent would wait for ever."""

    def try_receive(self) -> Frame | None:
        message = self._inbox.take()
        return None if message is None else self._opened(unwrap(message))

    def poll(self) -> Frame | None:
        message = self._inbox.poll()
        return None if message is None else self._opened(unwrap(message))

    def _opened(self, frame: memoryview) -> Frame:
        """The frame in these bytes: a small one in its microbatch's slot, which has its tensors already."""
        size = frame.nbytes
        if HEADER_BYTES <= size <= _COPIED_BYTES:
            _, microbatch = peek(frame)
            if microbatch < len(self._slots) and size <= self._slots[microbatch].nbytes:
                self._rooms[microbatch][:size] = frame
                return self._slots[microbatch].read(size)
        return decode(frame, self._max_bytes)

    def fileno(self) -> int:
        return self._inbox.fileno()

    def announce(self, ring: Callable[[], None]) -> bool:
        self._inbox.announce(ring)
        return True

    def close(self) -> None:
        self._ended("this side closed the link")
        self._inbox.close()

    def _ended(self, why: str | TransportError) -> None:
        """Any thread: nothing more will come, and what is still to be sent is the last."""
        error = PeerLost(f"{self.peer} is gone: {why}", peer=self.peer) if isinstance(why, str) else why
        self._inbox.end(error)
        self._outbox.put(None)

    def _outgoing(self) -> Iterator[bytes]:
        """For gRPC's thread. It looks up every second: a forgotten link must not keep the process from ending."""
        while threading.main_thread().is_alive():
            try:
                message = self._outbox.get(timeout=1.0)
            except queue.Empty:
                continue
            if message is None:
                return
            yield message


class _ClientLink(_GrpcLink):
    """The attention side's end."""

    def __init__(self, address: str, hello: Hello, credentials: Credentials) -> None:
        super().__init__(f"ffn_rank {hello.ffn_rank}", hello, hello.combine_bytes)
        self._address = address
        # A subchannel of its own: else a second try inherits the first one's back-off.
        options = [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        options.append(("grpc.max_receive_message_length", hello.combine_bytes + _ENVELOPE_BYTES))
        self._channel = channel(address, credentials, options)
        self._outbox.put(hello_packet(hello))
        exchange = self._channel.stream_stream(_METHOD, response_deserializer=self.arrived)
        self._call = exchange(self._outgoing(), metadata=metadata(credentials))
        self._reader = threading.Thread(target=self._read, name=f"afd-grpc-{self.peer}", daemon=True)
        self._reader.start()

    def shake_hands(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while (welcome := self._inbox.take()) is None:
            if not wait_readable(self._inbox.fileno(), until - time.monotonic()):
                raise PeerTimeout(
                    f"{self.peer} did not answer the handshake on grpc:{self._address} within {timeout_s:.3g} s "
                    "(transport.connect_s)",
                    peer=self.peer,
                )
        check_welcome(welcome, self.peer)

    def _read(self) -> None:
        why: str | TransportError = "it closed its end"
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            why = lost(error, self.peer, f"grpc:{self._address}")
        self._ended(why)

    def _cut(self) -> None:
        self._call.cancel()

    def close(self) -> None:
        super().close()
        self._reader.join(_CLOSE_S)
        self._call.cancel()
        self._reader.join(_CLOSE_S)
        self._channel.close()


class _ServerLink(_GrpcLink):
    """The FFN side's end, which lives in the handler of one stream."""

    def __init__(self, hello: Hello, stream: _Stream, context: grpc.ServicerContext) -> None:
        super().__init__(f"attention_rank {hello.attention_rank}", hello, hello.dispatch_bytes)
        self._context = context
        stream.link = self

    def _cut(self) -> None:
        self._context.cancel()

    def serve(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Runs both directions until either end closes."""
        if not self._context.add_callback(lambda: self._ended("its stream broke off")):
            self._ended("its stream broke off")
        reader = threading.Thread(target=self._read, args=(requests,), name=f"afd-grpc-{self.peer}", daemon=True)
        reader.start()
        yield from self._outgoing()

    def _read(self, requests: Iterator[bytes]) -> None:
        why = "it closed its end"
        try:
            for _ in requests:
                pass
        except grpc.RpcError:
            why = "its stream broke off"
        self._ended(why)


class _Stream:
    """One stream of the server: the messages before its link is there are the handler's, those after it the link's."""

    def __init__(self) -> None:
        self.link: _ServerLink | None = None

    def arrived(self, message: bytes) -> bytes:
        """gRPC's deserializer."""
        return message if self.link is None else self.link.arrived(message)


class _Streams(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Gives every stream a deserializer of its own."""

    def __init__(self, exchange: Callable[[_Stream, Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]) -> None:
        self._exchange = exchange

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method != _METHOD:
            return None
        stream = _Stream()
        return grpc.stream_stream_rpc_method_handler(partial(self._exchange, stream), stream.arrived)


class GrpcListener(Listener):
    """A gRPC server; `address` is host:port with the real port."""

    def __init__(self, expected: Hello, bind: str, credentials: Credentials) -> None:
        host, port = split_bind(bind)
        self._expected = expected
        self._threads = ThreadPoolExecutor(_MAX_STREAMS, thread_name_prefix="afd-grpc")
        self._server = grpc.server(
            self._threads,
            handlers=[_Streams(self._exchange)],
            interceptors=[SyncGuard(credentials)],
            options=[
                *_OPTIONS,
                *server_options(),
                ("grpc.max_receive_message_length", expected.dispatch_bytes + _ENVELOPE_BYTES),
            ],
            maximum_concurrent_rpcs=_MAX_STREAMS,
        )
        try:
            actual = open_port(self._server, host, port, credentials)
        except RuntimeError as error:
            raise TransportError(
                f"ffn_rank {expected.ffn_rank} cannot listen on {bind} (transport.bind): {why_not(host, port)}"
            ) from error
        self._accepted: Mailbox[Link] = Mailbox()
        self._server.start()
        self.address = f"{host}:{actual}"

    def _exchange(self, stream: _Stream, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The handler of one stream, in a thread of its own."""
        patience = threading.Timer(_HANDSHAKE_S, _show_out, [context])
        patience.daemon = True
        patience.start()
        try:
            first = next(requests, None)
        except grpc.RpcError:
            return
        finally:
            patience.cancel()
        if first is None:
            return
        hello, welcome = answer(self._expected, first)
        link = None if hello is None else _ServerLink(hello, stream, context)  # before the peer may send frames
        yield welcome
        if link is None:
            return
        if not self._accepted.put(link):
            link.close()
            return
        yield from link.serve(requests)

    def try_accept(self) -> Link | None:
        return self._accepted.take()

    def fileno(self) -> int:
        return self._accepted.fileno()

    def close(self) -> None:
        """No new stream is taken; streams whose links are still open are cut after a second."""
        while not self._accepted.ended and (link := self._accepted.take()) is not None:
            link.close()
        self._accepted.end(PeerLost("the door is closed"))
        self._accepted.close()
        self._server.stop(_CLOSE_S).wait(2 * _CLOSE_S)
        self._threads.shutdown(wait=False)


def _show_out(context: grpc.ServicerContext) -> None:
    _log.warning("the gRPC client %s said nothing for %g s and was shown out", context.peer(), _HANDSHAKE_S)
    context.cancel()
