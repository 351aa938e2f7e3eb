"""The one list of what runs in the cluster, by name, and what each must offer.

Nothing in afd imports a role package (the layers run roles → afd), so roles are named by strings and imported where
they run: in the worker's own process, which is also the only one that should pay for loading torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from afd.pipeline.timeline import Recording
from afd.types import FfnAddress


@dataclass(frozen=True, slots=True)
class Roles:
    """Import paths: `module:Class` of the two workers, and the router's module."""

    attention: str = "attention_worker.actor:AttentionWorker"
    ffn: str = "ffn_worker.actor:FfnWorker"
    router: str = "router.app"


class FfnRole(Protocol):
    """What an FFN worker offers; built with (deployment, ffn_rank, epoch, workers_on_host, credentials)."""

    def prepare(self) -> None:
        """Does what comes before the weights, which is the same for every rank: of a standby, built without a rank
        (None), all there is to do until `start` tells it one. Optional otherwise."""

    def start(self, ffn_rank: int | None = None) -> FfnAddress:
        """Loads weights, listens, starts its loop. Any thread; takes as long as loading does. `ffn_rank`: a standby's
        from now on."""

    def status(self) -> dict[str, object]:
        """{"state": a WorkerState, "message": one sentence when lost, "address": what `start` gave, or None before,
        "totals": its timeline's, or None before there is one, "pid", ...counters}. Never blocks. Whoever is "lost" is
        ended, and started again."""

    def timeline(self, since_ns: int, max_events: int) -> Recording:
        """The newest part of its timeline: afd.pipeline.timeline.Timeline.since. Never blocks. Raises ClusterError
        before its loop runs."""

    def stop(self) -> None:
        """Ends the loop and closes every link. Legal in any state."""


class AttentionRole(Protocol):
    """What an attention worker offers; built with (deployment, attention_rank, epoch, workers_on_host, credentials)."""

    def start(self) -> str:
        """Loads weights and serves requests at the returned host:port."""

    def connect(self, ffn: Sequence[FfnAddress], within_s: float | None = None) -> None:
        """Shakes hands with every FFN worker, then starts the engine; within transport.connect_s, or less. Raises
        TransportError; may then be called again."""

    def reconnect(self, ffn: Sequence[FfnAddress], within_s: float) -> None:
        """Shakes hands with those of `ffn` that it has no link to, and gives them what their rank owes. Returns once
        the engine has them. Raises TransportError for the first that cannot be reached."""

    def status(self) -> dict[str, object]:
        """As an FFN worker's, and "ffn_living": addresses of the FFN workers it has a link to; "ffn_suspects": why it
        has closed its link, by the address of each that was too late or sent what it must not."""

    def timeline(self, since_ns: int, max_events: int) -> Recording:
        """As an FFN worker's."""

    def stop(self, drain_s: float = 0.0) -> None:
        """Lets running requests finish for at most `drain_s` seconds, tells the others, ends. Legal in any state,
        before `connect` too."""


def load(path: str) -> Any:
    """The module `package.module`, or the object `package.module:Name`."""
    module, _, name = path.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if name else loaded
