"""One seat of the cluster, and the worker that sits there in its present life."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from afd.cluster.host import Handle
from afd.cluster.placement import Seat
from afd.cluster.probe import Probe
from afd.cluster.restarts import Restarts
from afd.types import FfnAddress, Role, WorkerView

# Of what a role's status says.
NOT_COUNTERS = frozenset({"state", "message", "pid", "totals", "address", "ffn_living", "ffn_suspects"})


class Phase(Enum):
    """How far a life has come."""

    WAITING = auto()  # for its turn to be started
    STARTING = auto()  # `start` is under way
    LOADED = auto()  # an attention worker that is to be connected to the FFN workers
    CONNECTING = auto()  # and is being
    SERVING = auto()
    GIVEN_UP = auto()


@dataclass(eq=False)
class Worker:
    """Belongs to the controller's thread. The view is replaced, never changed, so that other threads may read it."""

    seat: Seat
    view: WorkerView
    restarts: Restarts
    phase: Phase = Phase.WAITING
    handle: Handle | None = None  # None before its first life
    probe: Probe | None = None
    call: Future[Any] | None = None  # the start, connect or reconnect that is open,
    since_s: float = 0.0  # since when; while waiting or loaded, when it is due
    ffn_address: FfnAddress | None = None  # of an FFN worker that has started
    living: set[FfnAddress] = field(default_factory=set)  # FFN workers that an attention worker has a link to

    @classmethod
    def at(cls, seat: Seat, restarts: Restarts) -> Worker:
        """A seat where nobody sits yet."""
        return cls(seat, WorkerView(seat.role, seat.rank, "starting", replica=seat.replica), restarts)

    @property
    def name(self) -> str:
        return self.seat.name

    @property
    def ffn_rank(self) -> int | None:
        """None: of an attention worker."""
        return self.seat.rank if self.seat.role is Role.FFN else None

    def begins(self, handle: Handle, call: Future[Any], now_s: float, wake: Callable[[], None]) -> None:
        """A new life; `call` is its start."""
        self.handle, self.probe = handle, Probe(handle, wake)
        self.ffn_address, self.living = None, set()
        self.view = replace(self.view, address="", counters={}, totals=None)
        self.does(Phase.STARTING, call, now_s)

    def does(self, phase: Phase, call: Future[Any] | None, now_s: float) -> None:
        """Goes into `phase`, whose call this is."""
        self.phase, self.call, self.since_s = phase, call, now_s

    def started(self, address: FfnAddress | str) -> None:
        """Takes in what its start gave: an FFN worker serves from now on; an attention worker, that is `host:port`,
        only once it is connected."""
        self.call = None
        if isinstance(address, FfnAddress):
            self.ffn_address = replace(address, replica=self.seat.replica)
            self.serves()
        else:
            self.view = replace(self.view, address=address)
            self.phase = Phase.LOADED

    def serves(self) -> None:
        self.phase = Phase.SERVING
        self.view = replace(self.view, state="ready", message="")

    def says(self, status: dict[str, Any]) -> None:
        """Takes in what a worker that serves says of itself."""
        counters = {name: count for name, count in status.items() if name not in NOT_COUNTERS}
        self.view = replace(
            self.view,
            state=status["state"],
            message=status["message"],
            counters=counters,
            totals=status.get("totals"),
        )
        self.living = set(status.get("ffn_living", ()))

    def shown(self) -> WorkerView:
        """The view with what only the handle knows. Any thread."""
        handle = self.handle
        return self.view if handle is None else replace(self.view, pid=handle.pid, node=handle.node)
