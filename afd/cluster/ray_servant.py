"""What runs in Ray's actors: a Servant, with its own log, and its name in front of what Ray prints of it."""

from __future__ import annotations

import logging
import os
import threading
import time

from afd import log as logs
from afd.cluster.host import this_node
from afd.cluster.ray_core import ray
from afd.cluster.ray_nodes import at_home
from afd.cluster.servant import Outcome, Servant
from afd.config import Deployment

log = logging.getLogger(__name__)

ORPHAN_S = 120.0  # a worker that nobody asks anything for this long belongs to nobody any more


class RayServant(Servant):
    """A Servant that is a whole Ray actor: with its own log, and its name in front of what Ray prints of it."""

    def __init__(self, name: str, role: str, args: tuple[object, ...]) -> None:
        logs.setup(name)
        super().__init__(name, role, args)

    def __repr__(self) -> str:
        return self.name

    def identity(self) -> tuple[int, str, str]:
        """The process id, the machine's name, and Ray's name for the node."""
        return os.getpid(), this_node(), ray.get_runtime_context().get_node_id()


class RayWorker(RayServant):
    """The servant of an attention or FFN worker. It outlives the controller, which finds it again (RayHost.survivors);
    but when nobody has asked it anything for ORPHAN_S seconds, its whole run is gone, and it ends. Its deployment says
    the address of the node it was placed on."""

    def __init__(self, name: str, role: str, args: tuple[object, ...]) -> None:
        super().__init__(name, role, tuple(at_home(arg) if isinstance(arg, Deployment) else arg for arg in args))
        self._asked_s = time.monotonic()
        threading.Thread(target=self._watch, name="watches for orphanhood", daemon=True).start()

    def call(self, method: str, args: tuple[object, ...]) -> Outcome:
        self._asked_s = time.monotonic()
        return super().call(method, args)

    def _watch(self) -> None:
        while time.monotonic() < self._asked_s + ORPHAN_S:
            time.sleep(ORPHAN_S / 10)
        log.error("nobody has asked %s how it is for %g s: its run is over", self.name, ORPHAN_S)
        os._exit(1)
