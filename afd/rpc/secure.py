"""How the two ends of a gRPC connection prove who they are, and what a server puts up with from those who do not.

Every call carries the cluster's token in its metadata, so a stranger is refused before a handler runs or a message of
theirs is read. With transport.tls both ends also show a certificate of the cluster's authority.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from afd.config import TlsSection
from afd.credentials import Credentials, read_pem
from afd.errors import PeerLost, TransportError, Unauthenticated

log = logging.getLogger(__name__)

# Of every server of ours.
HANDSHAKE_S = 5.0  # longest until a connection has said HTTP/2, under TLS too
IDLE_S = 30.0  # longest that a connection without a call is kept
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port that is taken must be an error
    ("grpc.max_concurrent_streams", 16),  # of one connection: workers and routers need two
    ("grpc.max_allowed_incoming_connections", 1024),
)

_KEY = "afd-cluster-token"
_COMPLAINT_S = 1.0  # at most one line in this time: who is refused must not fill the disk

Metadata = tuple[tuple[str, str], ...]


def metadata(credentials: Credentials) -> Metadata:
    """What a client sends along with each call."""
    return ((_KEY, credentials.token),) if credentials.token else ()


def open_port(server: Any, host: str, port: int, credentials: Credentials) -> int:
    """Lets `server` (of grpc or grpc.aio) listen, and gives the port. Raises TransportError for an address that other
    machines reach when nothing is asked of them, ConfigError for bad certificates, RuntimeError when it cannot bind."""
    if not (credentials.token or credentials.tls or is_loopback(host)):
        raise TransportError(
            f"nothing listens on {host} (transport.bind), which other machines reach, without a cluster token or "
            "transport.tls"
        )
    if credentials.tls is None:
        return int(server.add_insecure_port(f"{host}:{port}"))
    pem = read_pem(credentials.tls)
    secured = grpc.ssl_server_credentials([(pem.key, pem.cert)], root_certificates=pem.ca, require_client_auth=True)
    return int(server.add_secure_port(f"{host}:{port}", secured))


def server_options() -> list[tuple[str, int]]:
    """Of every server of ours: what bounds a client that has not shown anything yet."""
    times = (("grpc.server_handshake_timeout_ms", HANDSHAKE_S), ("grpc.max_connection_idle_ms", IDLE_S))
    return [*SERVER_OPTIONS, *((name, int(seconds * 1000)) for name, seconds in times)]


def channel(address: str, credentials: Credentials, options: Sequence[tuple[str, int]]) -> Any:
    """A grpc.Channel to host:port. Raises ConfigError for bad certificates."""
    if credentials.tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, _client(credentials.tls), options=[*options, *_named(credentials.tls)])


def aio_channel(address: str, credentials: Credentials, options: Sequence[tuple[str, int]]) -> Any:
    """The same for asyncio."""
    if credentials.tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, _client(credentials.tls), options=[*options, *_named(credentials.tls)])


def lost(error: Any, peer: str, where: str) -> TransportError:
    """A grpc.RpcError as ours, with the sentence that the peer gave."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(f"{peer} refused the connection on {where}: {details}", peer=peer)
    if any(said in details for said in ("handshake failed", "Verification Check failed")):  # BoringSSL, gRPC
        return Unauthenticated(f"no TLS handshake with {peer} on {where} (transport.tls): {details}", peer=peer)
    return PeerLost(f"{peer} is gone: {code.name} on {where} ({details})", peer=peer)


class Guard:
    """Whether a call may be served. One for each server."""

    def __init__(self, credentials: Credentials) -> None:
        self._expected = credentials.token.encode()
        self._complained_at = float("-inf")

    def refusal(self, details: Any) -> str:
        """Why the call of these HandlerCallDetails is refused, or ""."""
        if not self._expected:
            return ""
        tokens = [value for key, value in details.invocation_metadata or () if key == _KEY]
        if not tokens:
            return "it came without the cluster's token; who starts the cluster hands it to its workers and routers"
        sent = tokens[0] if isinstance(tokens[0], bytes) else tokens[0].encode()
        if len(tokens) == 1 and hmac.compare_digest(sent, self._expected):
            return ""
        return "its cluster token is another cluster's (transport.token_file, AFD_CLUSTER_TOKEN)"

    def complain(self, peer: str, sentence: str) -> None:
        """Logs a refusal."""
        if time.monotonic() - self._complained_at >= _COMPLAINT_S:
            self._complained_at = time.monotonic()
            log.warning("refused a call of %s: %s", peer, sentence)


class SyncGuard(grpc.ServerInterceptor):  # type: ignore[misc]
    """Of a grpc.server."""

    def __init__(self, credentials: Credentials) -> None:
        self._guard = Guard(credentials)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """See grpc.ServerInterceptor. Refuses whatever the method is, before a message is read."""
        sentence = self._guard.refusal(handler_call_details)
        if not sentence:
            return continuation(handler_call_details)

        def refuse(_: Any, context: Any) -> None:
            self._guard.complain(context.peer(), sentence)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, sentence)

        return grpc.stream_stream_rpc_method_handler(refuse)


class AioGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Of a grpc.aio.server."""

    def __init__(self, credentials: Credentials) -> None:
        self._guard = Guard(credentials)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        sentence = self._guard.refusal(handler_call_details)
        if not sentence:
            return await continuation(handler_call_details)

        async def refuse(_: Any, context: Any) -> None:
            self._guard.complain(context.peer(), sentence)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, sentence)

        return grpc.stream_stream_rpc_method_handler(refuse)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, an address (an IPv6 one with or without brackets) or a name."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(item[4][0])).is_loopback for item in found)


def _client(tls: TlsSection) -> Any:
    pem = read_pem(tls)
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)


def _named(tls: TlsSection) -> list[tuple[str, str]]:
    """Which name the peer's certificate must hold, where that is not its address."""
    return [] if tls.name is None else [("grpc.ssl_target_name_override", tls.name)]
