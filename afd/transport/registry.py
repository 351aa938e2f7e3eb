"""The transports by name, and which of them a pair of workers uses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from afd.credentials import OPEN, Credentials
from afd.errors import ConfigError, PeerLost, PeerTimeout, TransportError
from afd.transport import collective, grpc_stream, local, shm
from afd.transport.attention_port import AttentionPort
from afd.transport.base import Hello, Link, Listener
from afd.transport.local import Faults
from afd.transport.ports import FfnPort
from afd.types import FfnAddress

_CPU = torch.device("cpu")
_RETRY_S = 0.05  # between two tries to reach an FFN worker that is not there yet


@dataclass(frozen=True, slots=True)
class _Options:
    """What the transports' own `listen` and `dial` pick from."""

    bind: str
    deadline_s: float
    faults: Faults | None
    device: torch.device
    credentials: Credentials


@dataclass(frozen=True, slots=True)
class _Transport:
    """One entry of the list. Its name is also the field of FfnAddress that `dial` takes.

    reaches: whether this process can use it to an address. missing: why this machine has none, "" when it has.
    is_here: whether the door is where `reaches` thinks it is; asked by `auto`, which has others to choose from.
    """

    listen: Callable[[Hello, _Options], Listener]
    dial: Callable[[str, Hello, float, _Options], Link]
    reaches: Callable[[FfnAddress], bool]
    missing: Callable[[], str] = lambda: ""
    is_here: Callable[[FfnAddress], bool] = lambda _: True


_TRANSPORTS = {  # the best first: `auto` takes the first that reaches
    "inproc": _Transport(
        listen=lambda expected, o: local.listen(expected, o.faults),
        dial=lambda address, hello, _, o: local.dial(address, hello, o.faults),
        reaches=lambda address: local.has_door(address.inproc),
    ),
    "shm": _Transport(
        listen=lambda expected, o: shm.listen(expected, o.deadline_s),
        dial=lambda address, hello, timeout_s, o: shm.dial(address, hello, timeout_s, o.deadline_s),
        reaches=lambda address: bool(address.shm) and address.host_key == host_key() != "",
        missing=shm.missing,
        is_here=lambda address: shm.is_here(address.shm),
    ),
    "grpc": _Transport(
        listen=lambda expected, o: grpc_stream.listen(expected, o.bind, o.credentials),
        dial=lambda address, hello, timeout_s, o: grpc_stream.dial(address, hello, timeout_s, o.credentials),
        reaches=lambda address: bool(address.grpc),
    ),
    "collective": _Transport(
        listen=lambda expected, o: collective.listen(expected, o.bind, o.deadline_s, o.device),
        dial=lambda address, hello, timeout_s, o: collective.dial(address, hello, timeout_s, o.deadline_s, o.device),
        reaches=lambda address: bool(address.collective),
        missing=collective.missing,
    ),
}
NAMES = ("auto", *_TRANSPORTS)


def host_key() -> str:
    """Equal for two processes that may share memory: same boot, network namespace (abstract sockets end at it) and
    user, in the same user namespace. The host's name does not count: containers of different hosts may share it.
    Virtual machines that were copied while they ran may have equal keys; so `auto` also looks for the door itself.
    "" where it cannot be told, which equals nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        net, user = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "user"))
        return f"{boot}-{net}-{user}-{os.getuid()}"
    except OSError:
        return ""


def listen(
    kind: str,
    expected: Hello,
    *,
    bind: str,
    spin_us: int,
    deadline_s: float,
    faults: Faults | None = None,
    device: torch.device = _CPU,
    credentials: Credentials = OPEN,
) -> FfnPort:
    """Opens the doors of one FFN worker. `expected` is what it serves: attention workers whose Hello differs are
    refused (attention_rank aside; max_tokens and microbatches are limits).

    kind "auto" listens on shm, where the machine has it, and gRPC. bind: the address gRPC and collective listen on and
    tell their peers (with or without a port). spin_us: how long a wait polls before it sleeps. deadline_s: longest
    time a send may block. faults: of the inproc transport. device: whose memory the collective transport's frames come
    to. credentials: what gRPC asks of its peers. Raises TransportError when a door cannot be opened, ConfigError for an
    unknown kind.
    """
    options = _Options(bind, deadline_s, _checked_faults(kind, faults), device, credentials)
    if kind == "auto":
        names = [name for name in ("shm", "grpc") if not _TRANSPORTS[name].missing()]
    else:
        _lookup(kind)
        names = [kind]
    with ExitStack() as opened:
        listeners: dict[str, Listener] = {}
        for name in names:
            listeners[name] = _TRANSPORTS[name].listen(expected, options)
            opened.callback(listeners[name].close)
        doors: dict[str, Any] = {name: listener.address for name, listener in listeners.items()}
        port = FfnPort(
            tuple(listeners.values()),
            FfnAddress(expected.ffn_rank, host_key(), **doors),
            expected,
            spin_us=spin_us,
        )
        opened.pop_all()
    return port


def connect(
    kind: str,
    addresses: Sequence[FfnAddress],
    hello: Hello,
    *,
    connect_s: float,
    deadline_s: float,
    spin_us: int,
    faults: Faults | None = None,
    device: torch.device = _CPU,
    credentials: Credentials = OPEN,
) -> AttentionPort:
    """Connects one attention worker to every FFN worker. `hello` is what it believes; ffn_rank is filled in from each
    address. FFN workers that are not there yet are tried again.

    kind "auto" takes for each the first of inproc, shm and gRPC that reaches it. connect_s: longest time for all
    together. deadline_s: longest wait for one answer. device: whose memory the collective transport's frames come to.
    credentials: what gRPC shows its peers. Raises HandshakeRefused, PeerLost or PeerTimeout with `peer`
    naming the FFN worker, TransportError when it cannot be reached by `kind` or an FFN rank's address is missing,
    ConfigError for an unknown kind.
    """
    places = sorted((a.ffn_rank, a.replica) for a in addresses)
    ranks, wanted = sorted({rank for rank, _ in places}), list(range(hello.ep * hello.tp))
    if ranks != wanted or len(set(places)) < len(places):
        named = [rank for rank, _ in places]
        raise TransportError(f"addresses name the ffn_ranks {named}; EP {hello.ep} times TP {hello.tp} needs {wanted}")
    until = time.monotonic() + connect_s
    with ExitStack() as opened:
        links = []
        for address in sorted(addresses, key=lambda a: (a.ffn_rank, a.replica)):
            left_s = until - time.monotonic()
            link = dial(
                kind, address, hello, connect_s=left_s, deadline_s=deadline_s, faults=faults, device=device,
                credentials=credentials,
            )  # fmt: skip
            links.append((address, link))
            opened.callback(link.close)
        port = AttentionPort(links, spin_us=spin_us, deadline_s=deadline_s)
        opened.pop_all()
    return port


def dial(
    kind: str,
    address: FfnAddress,
    hello: Hello,
    *,
    connect_s: float,
    deadline_s: float,
    faults: Faults | None = None,
    device: torch.device = _CPU,
    credentials: Credentials = OPEN,
) -> Link:
    """Connects to one FFN worker, for AttentionPort.adopt; arguments and errors as of `connect`. Any thread."""
    options = _Options("", deadline_s, _checked_faults(kind, faults), device, credentials)
    until = time.monotonic() + connect_s
    return _dial(_choose(kind, address), address, replace(hello, ffn_rank=address.ffn_rank), until, options)


def _lookup(kind: str) -> _Transport:
    if kind not in _TRANSPORTS:
        raise ConfigError(f"there is no transport {kind!r} (transport.kind); choose one of {', '.join(NAMES)}")
    return _TRANSPORTS[kind]


def _checked_faults(kind: str, faults: Faults | None) -> Faults | None:
    if faults is not None and kind != "inproc":
        raise ConfigError(f"faults are the inproc transport's; transport.kind is {kind!r}")
    return faults


def _choose(kind: str, address: FfnAddress) -> str:
    """The transport to use to `address`."""
    peer = f"ffn_rank {address.ffn_rank}"
    if kind != "auto":
        if not _lookup(kind).reaches(address) and not (kind == "inproc" and address.inproc):
            raise TransportError(
                f"{peer} cannot be reached by {kind} (transport.kind) from host {host_key()!r}: {address}; try auto",
                peer=peer,
            )
        return kind
    for name, transport in _TRANSPORTS.items():
        if transport.reaches(address) and not transport.missing() and transport.is_here(address):
            return name
    raise TransportError(f"{peer} can be reached by no transport: {address}", peer=peer)


def _dial(name: str, address: FfnAddress, hello: Hello, until: float, options: _Options) -> Link:
    """Dials until it is answered, or `until` (monotonic) has come: a worker being started again is not an error yet."""
    while True:
        left_s = until - time.monotonic()
        try:
            return _TRANSPORTS[name].dial(getattr(address, name), hello, max(left_s, 1e-3), options)
        except PeerTimeout:
            raise
        except PeerLost:
            if left_s <= _RETRY_S:
                raise
            time.sleep(_RETRY_S)
