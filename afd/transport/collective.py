"""torch.distributed between two workers: NCCL between GPUs, Gloo between CPUs.

Each pair of workers has process groups of two members for itself. So a worker that leaves takes nobody else's group
along, and one that comes again gets new groups.

A frame travels as its head (its size, then the frame's header), always in host memory and by Gloo, since the receiver
must know the size before it can ask for the rest; and its body, from and into buffers registered at connect: by the
same Gloo group on CPUs, by NCCL on GPUs, where each direction has a group (two sends that meet in one would wait for
each other). An error's sentence is host memory on any device.

Workers meet in the FFN side's TCPStore: the attention side puts its Hello into a queue there and finds the Welcome
under the name it gave itself.

On GPUs: not measured.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from afd.errors import FrameError, PeerLost, PeerTimeout, TransportError
from afd.transport.base import Hello, Link, Listener
from afd.transport.binding import split_bind, why_not
from afd.transport.frame import Frame, Slot, peek
from afd.transport.handshake import answer, check_welcome, hello_packet
from afd.transport.mailbox import Mailbox
from afd.transport.shape import HEADER_BYTES, MAX_MESSAGE_BYTES, FrameKind

_log = logging.getLogger(__name__)

dist: Any = torch.distributed  # its type stubs lack half of what is used here

_CPU = torch.device("cpu")
_SIZE_BYTES = 8  # in front of every frame; 0 says that nothing follows: the peer closes
_HEAD_BYTES = _SIZE_BYTES + HEADER_BYTES
_KNOCKS = "knocks"  # the store's queue of Hellos, each after its sender's name
_NAME_BYTES = 16
_HANDSHAKE_S = 5.0  # an attention worker that knocked has this long to join its group
_CLOSE_S = 0.5  # longest wait for the peer to take our goodbye
_FOREVER = timedelta(days=365)  # of the reader's thread, which close and the peer's end wake up


def missing() -> str:
    """Why this machine has none, "" when it has."""
    return "" if dist.is_available() and dist.is_gloo_available() else "this torch is built without Gloo"


def listen(expected: Hello, bind: str, deadline_s: float, device: torch.device = _CPU) -> CollectiveListener:
    """A store on `bind`, an address (any free port) or address:port; frames arrive in `device`'s memory. Raises
    TransportError when it cannot bind."""
    return CollectiveListener(expected, bind, deadline_s, device)


def dial(address: str, hello: Hello, timeout_s: float, deadline_s: float, device: torch.device = _CPU) -> Link:
    """Meets the FFN worker whose store is at host:port within `timeout_s` seconds. Raises PeerLost, PeerTimeout,
    HandshakeRefused."""
    peer, until = f"ffn_rank {hello.ffn_rank}", time.monotonic() + timeout_s
    host, port = split_bind(address)
    here = _own_address(host, port, peer, timeout_s)
    try:
        store = _enter(host, port, until)
        name = secrets.token_hex(_NAME_BYTES // 2)
        store.queue_push(_KNOCKS, name.encode() + hello_packet(hello))
        store.wait([f"{name}/welcome"], _left(until))
        check_welcome(store.get(f"{name}/welcome"), peer)
        groups = _join(dist.PrefixStore(name, store), 1, here, until, device)
    except TransportError:
        raise
    except RuntimeError as error:  # torch's own errors derive from it
        if time.monotonic() < until:
            raise PeerLost(f"{peer} is gone: {_first_line(error)}", peer=peer) from error
        raise PeerTimeout(
            f"{peer} did not answer the handshake on collective:{address} within {timeout_s:.3g} s "
            "(transport.connect_s)",
            peer=peer,
        ) from error
    return CollectiveLink(peer, hello, groups, hello.dispatch_bytes, hello.combine_bytes, deadline_s)


@dataclass(frozen=True, slots=True)
class _Groups:
    """One member's way to the other. `outward` and `inward` carry what does not lie in host memory."""

    other: int  # the peer's number in the groups: the FFN worker is 0, the attention worker 1
    device: torch.device
    control: Any  # ProcessGroupGloo
    outward: Any  # control, or ProcessGroupNCCL
    inward: Any


def _join(store: Any, number: int, own_address: str, until: float, device: torch.device) -> _Groups:
    """Both members of a pair call this at the same time. Raises RuntimeError."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address, lazy_init=False)]
    options._timeout = _left(until)
    options._threads = 1
    control = dist.ProcessGroupGloo(dist.PrefixStore("control", store), number, 2, options)
    if device.type == "cpu":
        return _Groups(1 - number, device, control, control, control)
    to_ffn, to_attention = (
        dist.ProcessGroupNCCL(dist.PrefixStore(way, store), number, 2, dist.ProcessGroupNCCL.Options())
        for way in ("dispatch", "combine")
    )
    for group in (to_ffn, to_attention):
        group.eager_connect_single_device(device)
    outward, inward = (to_ffn, to_attention) if number else (to_attention, to_ffn)
    return _Groups(1 - number, device, control, outward, inward)


class _Slot:
    """Room for one frame with its size in front, in host memory and, where that is not the device's, there too."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.host = torch.zeros(_SIZE_BYTES + nbytes, dtype=torch.uint8)
        array: Any = self.host.numpy()
        self._bytes = memoryview(array)
        on_device = None if device.type == "cpu" else torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._on_device = on_device
        self._frame = Slot(self._bytes[_SIZE_BYTES:], on_device)

    def write(self, frame: Frame) -> int:
        size = self._frame.write(frame)
        self._bytes[:_SIZE_BYTES] = size.to_bytes(_SIZE_BYTES, "little")
        return size

    def read(self, size: int) -> Frame:
        return self._frame.read(size)

    def set_head(self, head: Tensor) -> None:
        self.host[:_HEAD_BYTES] = head

    @property
    def head(self) -> Tensor:
        return self.host[:_HEAD_BYTES]

    def body(self, size: int, in_host_memory: bool) -> Tensor:
        """What follows the head of a frame of `size` bytes."""
        if in_host_memory or self._on_device is None:
            return self.host[_HEAD_BYTES : _SIZE_BYTES + size]
        return self._on_device[HEADER_BYTES:size]


class CollectiveLink(Link):
    """Either end. A thread of its own reads, into the slot of the frame's microbatch: the peer sends one frame of a
    microbatch at a time."""

    def __init__(
        self, peer: str, hello: Hello, groups: _Groups, send_bytes: int, receive_bytes: int, deadline_s: float
    ) -> None:
        self.peer, self.hello = peer, hello
        self._groups = groups
        self._deadline_s = deadline_s
        self._max_bytes = receive_bytes
        slots, room = range(hello.microbatches), HEADER_BYTES + MAX_MESSAGE_BYTES
        self._out = [_Slot(max(send_bytes, room), groups.device) for _ in slots]
        self._in = [_Slot(max(receive_bytes, room), groups.device) for _ in slots]
        self._sending: dict[int, Any] = {}  # by microbatch: keeps what NCCL still reads alive
        self._inbox: Mailbox[tuple[int, int]] = Mailbox()  # (microbatch, bytes)
        self._closed = False
        self._reader = threading.Thread(target=self._read, name=f"afd-collective-{peer}", daemon=True)
        self._reader.start()

    def send(self, frame: Frame) -> None:
        if self._inbox.ended:
            raise PeerLost(f"{self.peer} is gone", peer=self.peer)
        slot = self._out[frame.microbatch]
        size = slot.write(frame)
        in_host_memory = self._groups.device.type == "cpu" or frame.kind is FrameKind.ERROR
        until = time.monotonic() + self._deadline_s
        try:
            self._put(slot.head, until)
            if size > HEADER_BYTES:
                body = slot.body(size, in_host_memory)
                if in_host_memory:
                    self._put(body, until)
                else:  # read by the device some time after this; the slot is written again after the answer
                    self._sending[frame.microbatch] = self._groups.outward.send([body], self._groups.other, 0)
        except RuntimeError as error:
            self._inbox.end(PeerLost(f"{self.peer} is gone: {_first_line(error)}", peer=self.peer))
            if time.monotonic() < until:
                raise PeerLost(f"{self.peer} is gone: {_first_line(error)}", peer=self.peer) from error
            raise PeerTimeout(
                f"{self.peer} has not taken a frame of {size} bytes for {self._deadline_s:.3g} s "
                "(transport.deadline_s)",
                peer=self.peer,
            ) from error

    def _put(self, part: Tensor, until: float) -> None:
        self._groups.control.send([part], self._groups.other, 0).wait(_left(until))

    def _read(self) -> None:
        head = torch.empty(_HEAD_BYTES, dtype=torch.uint8)
        number = head[:_SIZE_BYTES].view(torch.int64)
        try:
            while True:
                self._take(head)
                if (size := int(number)) == 0:
                    self._inbox.end(PeerLost(f"{self.peer} is gone: it closed its end", peer=self.peer))
                    return
                self._take_frame(head, size)
        except FrameError as error:
            self._inbox.end(error)
        except RuntimeError as error:
            self._inbox.end(PeerLost(f"{self.peer} is gone: {_first_line(error)}", peer=self.peer))

    def _take_frame(self, head: Tensor, size: int) -> None:
        """Reads what follows a head. Raises FrameError for one that says what cannot be, RuntimeError."""
        kind, microbatch = peek(head[_SIZE_BYTES:].numpy().tobytes())
        if not HEADER_BYTES <= size <= self._max_bytes:
            raise FrameError(f"a frame of {size} bytes came; the link carries {HEADER_BYTES} to {self._max_bytes}")
        if microbatch >= len(self._in):
            raise FrameError(
                f"a frame has microbatch {microbatch}; the limit is {len(self._in) - 1} (attention.microbatches)"
            )
        slot = self._in[microbatch]
        slot.set_head(head)
        if size > HEADER_BYTES:
            in_host_memory = self._groups.device.type == "cpu" or kind == FrameKind.ERROR
            body = slot.body(size, in_host_memory)
            if in_host_memory:
                self._take(body)
            else:
                with torch.cuda.device(self._groups.device):
                    self._groups.inward.recv([body], self._groups.other, 0).wait()
                    torch.cuda.current_stream().synchronize()
        self._inbox.put((microbatch, size))

    def _take(self, part: Tensor) -> None:
        self._groups.control.recv([part], self._groups.other, 0).wait(_FOREVER)

    def try_receive(self) -> Frame | None:
        return self._opened(self._inbox.take())

    def poll(self) -> Frame | None:
        return self._opened(self._inbox.poll())

    def _opened(self, came: tuple[int, int] | None) -> Frame | None:
        return None if came is None else self._in[came[0]].read(came[1])

    def fileno(self) -> int:
        return self._inbox.fileno()

    def announce(self, ring: Callable[[], None]) -> bool:
        self._inbox.announce(ring)
        return True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._inbox.ended:
            with suppress(RuntimeError):
                self._put(torch.zeros(_HEAD_BYTES, dtype=torch.uint8), time.monotonic() + _CLOSE_S)
        self._inbox.end(PeerLost(f"{self.peer} is gone: this side closed the link", peer=self.peer))
        self._inbox.close()
        self._groups.control.abort()
        if self._groups.device.type != "cpu":
            self._groups.outward.abort()
            self._groups.inward.abort()
        self._reader.join(_CLOSE_S)


class CollectiveListener(Listener):
    """The FFN side's store; `address` is host:port with the real port."""

    def __init__(self, expected: Hello, bind: str, deadline_s: float, device: torch.device) -> None:
        self._expected = expected
        self._deadline_s, self._device = deadline_s, device
        self._host, wanted = split_bind(bind)
        try:
            family = socket.AF_INET6 if self._host.startswith("[") else socket.AF_INET
            door = socket.create_server((self._host.strip("[]"), wanted), family=family)
        except OSError as error:
            raise TransportError(
                f"ffn_rank {expected.ffn_rank} cannot listen on {bind} (transport.bind): {why_not(self._host, wanted)}"
            ) from error
        self._port = door.getsockname()[1]
        self.address = f"{self._host}:{self._port}"
        self._store = dist.TCPStore(  # given the socket, it listens nowhere else
            self._host.strip("[]"),
            self._port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=door.detach(),
            use_libuv=True,
        )
        self._closed = False
        self._accepted: Mailbox[Link] = Mailbox()
        self._doorman = threading.Thread(target=self._open, name="afd-collective-door", daemon=True)
        self._doorman.start()

    def _open(self) -> None:
        store = self._store.clone()
        store.set_timeout(_FOREVER)
        while True:
            try:
                knock = bytes(store.queue_pop(_KNOCKS))
            except RuntimeError as error:
                if not self._closed:
                    _log.error("ffn_rank %d lets nobody in any more: %s", self._expected.ffn_rank, _first_line(error))
                return
            if self._closed:
                return
            threading.Thread(target=self._meet, args=(knock,), name="afd-collective-handshake", daemon=True).start()

    def _meet(self, knock: bytes) -> None:
        """The handshake with whoever knocked, in a thread of its own."""
        name, packet = knock[:_NAME_BYTES].decode("ascii", "replace"), knock[_NAME_BYTES:]
        until = time.monotonic() + _HANDSHAKE_S
        hello, welcome = answer(self._expected, packet)
        try:
            store = _enter(self._host, self._port, until)
            store.set(f"{name}/welcome", welcome)
            if hello is None:
                return
            groups = _join(dist.PrefixStore(name, store), 0, self._host.strip("[]"), until, self._device)
        except RuntimeError as error:
            _log.warning("an attention worker knocked and did not come in: %s", _first_line(error))
            return
        peer = f"attention_rank {hello.attention_rank}"
        link = CollectiveLink(peer, hello, groups, hello.combine_bytes, hello.dispatch_bytes, self._deadline_s)
        if not self._accepted.put(link):
            link.close()

    def try_accept(self) -> Link | None:
        return self._accepted.take()

    def fileno(self) -> int:
        return self._accepted.fileno()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(RuntimeError):
            self._store.queue_push(_KNOCKS, b"")
        self._doorman.join(_CLOSE_S)
        while not self._accepted.ended and (link := self._accepted.take()) is not None:
            link.close()
        self._accepted.end(PeerLost("the door is closed"))
        self._accepted.close()
        del self._store


def _enter(host: str, port: int, until: float) -> Any:
    """A client of the store at host:port. Raises RuntimeError."""
    return dist.TCPStore(host.strip("[]"), port, is_master=False, wait_for_workers=False, timeout=_left(until))


def _own_address(host: str, port: int, peer: str, timeout_s: float) -> str:
    """This machine's address on the way to host:port, where the groups' connections then start. Raises PeerLost when
    nobody listens there."""
    try:
        with socket.create_connection((host.strip("[]"), port), timeout_s) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PeerLost(f"{peer} is gone: {error.strerror or error} on collective:{host}:{port}", peer=peer) from error


def _left(until: float) -> timedelta:
    return timedelta(seconds=max(1e-3, until - time.monotonic()))


def _first_line(error: Exception) -> str:
    """What torch says, without where in its source it says so."""
    return str(error).split("\n", 1)[0].rpartition("] ")[2]
