"""Where to listen: `transport.bind` taken apart, and why listening there failed."""

from __future__ import annotations

import re
import socket

from afd.errors import TransportError


def split_bind(bind: str) -> tuple[str, int]:
    """Host (an IPv6 address in brackets) and port, 0 when there is none."""
    bare = bind if bind.count(":") < 2 or bind.startswith("[") else f"[{bind}]"
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+)(?::(\d{1,5}))?", bare)
    if match is None or int(match[2] or 0) > 65535:
        raise TransportError(f"cannot listen on {bind!r} (transport.bind): give an address, or address:port")
    return match[1], int(match[2] or 0)


def why_not(host: str, port: int) -> str:
    """Why binding failed, asked of the operating system."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.bind(found[0][4])
    except OSError as error:
        return error.strerror or str(error)
    return "it could not be bound"
