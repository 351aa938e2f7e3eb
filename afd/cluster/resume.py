"""A controller that takes over from one that died: who still serves keeps its seat, and all else is started again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from typing import Any

from afd.cluster.host import Handle
from afd.cluster.placement import Seat
from afd.cluster.probe import Probe
from afd.cluster.worker import Worker
from afd.types import FfnAddress

log = logging.getLogger(__name__)

SERVES = ("ready", "recovering", "draining")


def resume(workers: Mapping[Seat, Worker], survivors: Sequence[tuple[str, Handle]], within_s: float) -> bool:
    """Seats the `survivors` that say within `within_s` seconds that they serve, and ends the others; seats that stay
    empty are WAITING. Whether there were any survivors."""
    asked = [(name, handle, handle.submit("status")) for name, handle in survivors]
    wait([status for _, _, status in asked], within_s)
    for name, handle, answer in asked:
        status = answer.result() if answer.done() and answer.exception() is None else {}
        worker = _seat(workers, name, status)
        if worker is None:
            log.warning("%s of the last controller is ended: it has no seat, or does not serve", name)
            handle.kill()
        else:
            handle.name = worker.name
            worker.handle, worker.probe = handle, Probe(handle)
            worker.started(status["address"])
            worker.serves()
            worker.says(status)
    for worker in workers.values():
        worker.since_s = time.monotonic()
    seated = sum(worker.handle is not None for worker in workers.values())
    if survivors:
        log.warning("a new controller takes over: %d of %d workers serve", seated, len(workers))
    return bool(survivors)


def _seat(workers: Mapping[Seat, Worker], name: str, status: dict[str, Any]) -> Worker | None:
    """The free seat of a worker that serves; an FFN worker that was a standby has it by its rank, not by its name."""
    address = status.get("address")
    if status.get("state") not in SERVES or address is None:
        return None
    free = [worker for worker in workers.values() if worker.handle is None]
    named = [worker for worker in free if worker.name == name]
    if isinstance(address, FfnAddress):
        named += [worker for worker in free if worker.ffn_rank == address.ffn_rank]
    return named[0] if named else None
