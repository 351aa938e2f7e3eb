"""gRPC on a bare socket: calls that no client would make. HTTP/2 is written by hand, as far as that takes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(method: str, metadata: tuple[tuple[str, str], ...]) -> bytes:
    """A HEADERS frame that opens stream 1. Nothing is compressed."""
    pairs = ((":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x"))
    pairs += (("te", "trailers"), ("content-type", "application/grpc"), *metadata)
    block = b"".join(b"\x00" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in pairs)
    return frame(HEADERS, END_HEADERS, 1, block)


def message_of(nbytes: int, sent: bytes) -> bytes:
    """A DATA frame with the beginning of a message that claims to have `nbytes`."""
    return frame(DATA, 0, 1, b"\x00" + struct.pack(">I", nbytes) + sent)


@contextmanager
def connection(address: str, timeout_s: float) -> Iterator[socket.socket]:
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout_s) as client:
        yield client


def call(client: socket.socket, method: str, metadata: tuple[tuple[str, str], ...], data: bytes = b"") -> None:
    """Opens stream 1 and sends `data` on it."""
    with suppress(ConnectionError):  # shown out while it still talks
        client.sendall(PREFACE + frame(SETTINGS, 0, 0) + headers(method, metadata) + data)


def is_ended(client: socket.socket) -> bool:
    """Reads until the server has ended stream 1, or the connection; TimeoutError when it does neither in time."""
    with suppress(ConnectionError):
        while len(head := _exactly(client, 9)) == 9:
            payload = _exactly(client, int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind == SETTINGS and not flags & 1:
                client.sendall(frame(SETTINGS, 1, 0))
            if stream == 1 and (kind == RST_STREAM or (flags & END_STREAM and kind in (DATA, HEADERS))):
                return True
            if kind == GOAWAY and struct.unpack(">I", payload[4:8])[0]:
                return True
    return True


def _exactly(client: socket.socket, count: int) -> bytes:
    """Fewer bytes only at the end of the connection."""
    found = b""
    while len(found) < count and (more := client.recv(count - len(found))):
        found += more
    return found
