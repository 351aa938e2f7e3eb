"""Two hosts on one machine: network namespaces that only a cable between them joins, which can be cut and made slow."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NETNS = Path("/run/netns")
CLONE_NEWNET = 0x40000000  # linux/sched.h
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # those of deploy/README.md: of a block for documentation (RFC 5737)
BUFFER_BYTES = 4096  # what a slow cable lets pass at once: two packets, so that no frame is through before its time
LATENCY_MS = 400  # longest queue of a slow cable


def missing() -> str:
    """Why this machine cannot make them, as a sentence; "" when it can."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    name = f"afd-try-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other")
        finally:
            _ip("netns", "del", name)
    except FileNotFoundError:
        return "there is no `ip` (Debian's package iproute2)"
    except subprocess.CalledProcessError as error:
        return f"`ip` cannot make network namespaces with a cable here: {error.stderr.strip()}"
    return ""


@dataclass(frozen=True)
class Host:
    """One namespace: its name for `ip netns`, and its address on the cable."""

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """The command as this host runs it; its process is the very one that is started."""
        return ["ip", "netns", "exec", self.name, *command]

    def enter(self) -> None:
        """Puts the calling thread here for good: its sockets, and the processes and threads it starts."""
        descriptor = os.open(NETNS / self.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.name}")
        finally:
            os.close(descriptor)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same until the block ends."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.enter()
            yield
        finally:
            ctypes.CDLL(None).setns(before, CLONE_NEWNET)
            os.close(before)

    def pids(self) -> list[int]:
        """Every process here."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]


@dataclass(frozen=True)
class Hosts:
    """Both hosts and the cable between them."""

    first: Host
    second: Host

    def cut(self) -> None:
        """Pulls the cable out of the first host: nothing passes in either direction, and nobody is told."""
        _ip("-n", self.first.name, "link", "set", "cable", "down")

    def heal(self) -> None:
        """Plugs it in again."""
        _ip("-n", self.first.name, "link", "set", "cable", "up")

    @contextmanager
    def limited(self, mbit_s: float) -> Iterator[None]:
        """Until the block ends at most this many megabits a second pass in each direction."""
        bucket = ("tbf", "rate", f"{mbit_s}mbit", "burst", str(BUFFER_BYTES), "latency", f"{LATENCY_MS}ms")
        for host in (self.first, self.second):
            _run("tc", "-n", host.name, "qdisc", "add", "dev", "cable", "root", *bucket)
        try:
            yield
        finally:
            for host in (self.first, self.second):
                _run("tc", "-n", host.name, "qdisc", "del", "dev", "cable", "root")


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Both hosts; at the end they are gone, and every process in them. Call `missing` before."""
    mark = secrets.token_hex(3)
    first, second = (Host(f"afd-{mark}-{i}", address) for i, address in enumerate(ADDRESSES, 1))
    try:
        for host in (first, second):
            _ip("netns", "add", host.name)
        _ip("-n", first.name, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second.name)
        for host in (first, second):
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", host.name, "link", "set", device, "up")
        yield Hosts(first, second)
    finally:
        for host in (first, second):
            with suppress(subprocess.CalledProcessError):
                for pid in host.pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                _ip("netns", "del", host.name)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
