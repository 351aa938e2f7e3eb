"""Shared memory between two processes of one host (Linux): how they meet. What they then share: afd.transport.shm_link.

An abstract unix socket (SOCK_SEQPACKET) carries the handshake and hands over the memfd region that both sides map. The
kernel takes everything back when the processes are gone, killed or not: there is no file in /dev/shm, no socket file,
and the peer reads end-of-file at once.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
from pathlib import Path

from afd.errors import PeerLost, PeerTimeout, TransportError
from afd.transport.base import Hello, Link, Listener
from afd.transport.handshake import answer, check_welcome, hello_packet
from afd.transport.shm_link import Region, ShmLink, hang_up

_log = logging.getLogger(__name__)

_PEERCRED = struct.Struct("3i")  # pid, uid, gid
_PACKET_BYTES = 65536  # more than any handshake message
_HANDSHAKE_S = 5.0  # a client that says nothing for this long is shown out
_MAX_PENDING = 64  # clients in the door at once; the oldest leaves


def missing() -> str:
    """Why this platform has no such shared memory, as the end of a sentence; "" when it has."""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    lacking = [
        name
        for module, name in ((os, "memfd_create"), (socket, "SO_PEERCRED"), (fcntl, "F_ADD_SEALS"))
        if not hasattr(module, name)
    ]
    return f"this Python lacks {', '.join(lacking)}" if lacking else ""


def is_here(address: str) -> bool:
    """Whether a door with this name is open in this network namespace of this kernel: abstract sockets are known
    nowhere else. True where the system does not say."""
    try:
        return f" @{address}\n" in Path("/proc/self/net/unix").read_text(errors="replace")
    except OSError:
        return True


def listen(expected: Hello, deadline_s: float) -> ShmListener:
    """A door under a fresh abstract socket name. Raises TransportError where the platform has none."""
    if reason := missing():
        raise TransportError(f"the shm transport is not available: {reason}; use transport.kind grpc")
    return ShmListener(expected, deadline_s)


def dial(address: str, hello: Hello, timeout_s: float, deadline_s: float) -> Link:
    """Connects to the abstract socket `address` and shakes hands within `timeout_s` seconds; `deadline_s` bounds each
    later send. Raises PeerLost, PeerTimeout, HandshakeRefused, or TransportError where the platform has no memfd."""
    peer = f"ffn_rank {hello.ffn_rank}"
    if reason := missing():
        raise TransportError(f"the shm transport is not available: {reason}; use transport.kind grpc", peer=peer)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(max(timeout_s, 1e-3))
        sock.connect(f"\0{address}")
        _check_user(sock, peer)
        sock.send(hello_packet(hello))
        welcome, fds, _, _ = socket.recv_fds(sock, _PACKET_BYTES, 1)
        try:
            if not welcome:
                raise PeerLost(f"{peer} closed the connection during the handshake", peer=peer)
            check_welcome(welcome, peer)
            memory = _map(fds[0] if fds else -1, Region.of(hello).total_bytes, peer)
        finally:
            for fd in fds:
                os.close(fd)
    except TimeoutError as error:
        sock.close()
        raise PeerTimeout(
            f"{peer} did not answer the handshake on shm:{address} within {timeout_s:.3g} s (transport.connect_s)",
            peer=peer,
        ) from error
    except OSError as error:
        sock.close()
        raise PeerLost(f"{peer} cannot be reached on shm:{address}: {error.strerror or error}", peer=peer) from error
    except TransportError:
        sock.close()
        raise
    return ShmLink(peer, hello, sock, memory, attention_side=True, deadline_s=deadline_s)


class ShmListener(Listener):
    """The listening socket, and the clients that have not shaken hands yet. One epoll descriptor stands for all."""

    def __init__(self, expected: Hello, deadline_s: float) -> None:
        self._expected = expected
        self._deadline_s = deadline_s
        self.address = f"afd-{secrets.token_hex(12)}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.bind(f"\0{self.address}")
        self._sock.listen(_MAX_PENDING)
        self._sock.setblocking(False)
        self._pending: dict[
            int, tuple[socket.socket, float]
        ] = {}  # by descriptor: a client, and when it must have spoken
        self._epoll = select.epoll()
        self._epoll.register(self._sock.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def try_accept(self) -> Link | None:
        now = time.monotonic()
        for fd in [fd for fd, (_, until) in self._pending.items() if until < now]:
            _log.warning("a shared-memory client said nothing for %g s and was shown out", _HANDSHAKE_S)
            hang_up(self._leave(fd))
        for fd, _ in self._epoll.poll(0):
            if fd == self._sock.fileno():
                self._admit()
            elif (link := self._shake_hands(self._leave(fd))) is not None:
                return link
        return None

    def _admit(self) -> None:
        try:
            client, _ = self._sock.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                _log.warning("cannot accept a shared-memory client: %s", error.strerror)
            return
        client.setblocking(False)
        try:
            _check_user(client, "a shared-memory client")
        except TransportError as error:
            _log.warning("refused a connection: %s", error)
            client.close()
            return
        if len(self._pending) >= _MAX_PENDING:
            hang_up(self._leave(next(iter(self._pending))))
        self._pending[client.fileno()] = (client, time.monotonic() + _HANDSHAKE_S)
        self._epoll.register(client.fileno(), select.EPOLLIN)

    def _leave(self, fd: int) -> socket.socket:
        self._epoll.unregister(fd)
        return self._pending.pop(fd)[0]

    def _shake_hands(self, client: socket.socket) -> Link | None:
        """Answers the Hello that is here. The memory is made only for those who are welcome."""
        try:
            packet = client.recv(_PACKET_BYTES)
            if not packet:
                raise ConnectionResetError(errno.ECONNRESET, "it left during the handshake")
            hello, welcome = answer(self._expected, packet)
            if hello is None:
                client.send(welcome)
                hang_up(client)
                return None
            memory = self._hand_over(client, welcome, Region.of(hello).total_bytes)
        except OSError as error:
            _log.warning("the handshake with a shared-memory client failed: %s", error.strerror)
            hang_up(client)
            return None
        peer = f"attention_rank {hello.attention_rank}"
        return ShmLink(peer, hello, client, memory, attention_side=False, deadline_s=self._deadline_s)

    @staticmethod
    def _hand_over(client: socket.socket, welcome: bytes, size: int) -> mmap.mmap:
        """Makes the region, all its pages reserved now (later there would be no error, but a signal), and sends it."""
        fd = os.memfd_create("afd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = _mapped(fd, size)
            socket.send_fds(client, [welcome], [fd])
            return memory
        finally:
            os.close(fd)

    def close(self) -> None:
        for client, _ in self._pending.values():
            hang_up(client)
        self._pending.clear()
        self._epoll.close()
        self._sock.close()


def _map(fd: int, size: int, peer: str) -> mmap.mmap:
    """Maps the peer's memory, once it is known that nobody can shrink it under our feet."""
    if fd < 0:
        raise PeerLost(f"{peer} answered the handshake without its memory", peer=peer)
    actual = os.fstat(fd).st_size
    if actual != size or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise TransportError(
            f"{peer} offered {actual} bytes of memory; the handshake agreed on {size}, sealed", peer=peer
        )
    return _mapped(fd, size)


def _mapped(fd: int, size: int) -> mmap.mmap:
    """With the page tables filled in now, not by a fault in each page's first frame."""
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _check_user(sock: socket.socket, who: str) -> None:
    _, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    if uid != os.getuid():
        raise TransportError(
            f"{who} runs as user {uid}, this process as user {os.getuid()}; shared memory is for one user", peer=who
        )
