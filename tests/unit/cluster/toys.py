"""Roles that do nothing but start, answer and stop, or fail on request. Deployment.model is what they are told to do:
words such as `ffn0:refuse` (role, rank, deed) in any number."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Sequence

from afd.config import Deployment
from afd.credentials import Credentials
from afd.errors import CheckpointError, ClusterError, PeerLost
from afd.pipeline.timeline import Recording, Timeline
from afd.types import FfnAddress, Role


class Toy:
    role = ""

    def __init__(
        self, deployment: Deployment, rank: int | None, epoch: int, workers_on_host: int, credentials: Credentials
    ) -> None:
        self.rank = -1 if rank is None else rank
        self.num_ffn = deployment.counts.ffn
        self.replicas = deployment.ffn.replicas
        self.address: object = None
        self.life = secrets.token_hex(4)
        me = f"{self.role}{rank}:"
        self.deeds = [word.removeprefix(me) for word in deployment.model.split() if word.startswith(me)]
        self.never = threading.Event()
        self.time = Timeline(Role(self.role), rank, capacity=64)

    def begin(self) -> None:
        if "refuse" in self.deeds:
            raise CheckpointError(f"{self.role} {self.rank} does not like its weights")
        if "exit" in self.deeds:
            os._exit(7)
        if "hang" in self.deeds:
            self.never.wait()
        if "vanish" in self.deeds:
            threading.Timer(0.5, os._exit, (7,)).start()

    def status(self) -> dict[str, object]:
        lost = "lose" in self.deeds
        return {
            "state": "lost" if lost else "ready",
            "message": "the wire was cut" if lost else "",
            "address": self.address,
            "pid": os.getpid(),
            "deeds": len(self.deeds),
            "totals": self.time.totals(),
        }

    def timeline(self, since_ns: int, max_events: int) -> Recording:
        if "forget" in self.deeds:
            raise ClusterError(f"{self.role} {self.rank} does not remember")
        return self.time.since(since_ns, max_events)


class ToyFfn(Toy):
    role = "ffn"

    def prepare(self) -> None:
        if "unprepared" in self.deeds:
            raise CheckpointError("a standby does not like the plan")

    def start(self, ffn_rank: int | None = None) -> FfnAddress:
        self.rank = self.rank if ffn_rank is None else ffn_rank
        self.begin()
        self.address = FfnAddress(self.rank, inproc=f"toy {self.rank} {self.life}")
        return self.address

    def stop(self) -> None:
        pass


class ToyAttention(Toy):
    role = "attention"

    def start(self) -> str:
        self.begin()
        self.address = f"127.0.0.1:{self.rank + 1}"  # nobody listens there
        return self.address

    def connect(self, ffn: Sequence[FfnAddress], within_s: float | None = None) -> None:
        if "deaf" in self.deeds:
            self.never.wait()
        wanted = [(rank, replica) for rank in range(self.num_ffn) for replica in range(self.replicas)]
        if [(address.ffn_rank, address.replica) for address in ffn] != wanted:
            raise ClusterError(f"these are not all the FFN workers, in order: {ffn}")
        self.met = {(address.ffn_rank, address.replica): address for address in ffn}

    def reconnect(self, ffn: Sequence[FfnAddress], within_s: float) -> None:
        self.met |= {(address.ffn_rank, address.replica): address for address in ffn}

    def status(self) -> dict[str, object]:
        met = tuple(getattr(self, "met", {}).values())
        return super().status() | {"ffn_living": met, "lives": sorted(a.inproc.split()[-1] for a in met)}

    def stop(self, drain_s: float = 0.0) -> None:
        if "stuck" in self.deeds:
            self.never.wait()


class Oddities:
    """What can go wrong in a call."""

    def __init__(self, greeting: str) -> None:
        if greeting == "unbuildable":
            raise CheckpointError("no such greeting")
        self.greeting = greeting
        self.opened = threading.Event()

    def greet(self, whom: str) -> str:
        return f"{self.greeting}, {whom}"

    def raise_ours(self) -> None:
        raise PeerLost("ffn_rank 1 is gone", peer="ffn_rank 1")

    def raise_foreign(self) -> None:
        raise ZeroDivisionError("a bug")

    def return_lock(self) -> object:
        return threading.Lock()

    def wait(self) -> str:
        self.opened.wait()
        return "released"

    def stop(self) -> None:
        self.opened.set()

    def release(self) -> None:
        self.opened.set()

    def pid(self) -> int:
        return os.getpid()
