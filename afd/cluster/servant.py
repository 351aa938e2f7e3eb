"""The worker's end of every call: builds the role, runs its methods, turns what they raise into one sentence."""

from __future__ import annotations

import logging
import threading

from afd.cluster.roles import load
from afd.errors import AfdError, ClusterError

log = logging.getLogger(__name__)

Outcome = tuple[object, AfdError | None]  # what a method returned, or what it raised


class Servant:
    """Holds one role object in the process where it works. Calls may come from several threads.

    The role is imported and built by the first call rather than here, so that whatever goes wrong in it is that
    call's error and not a broken process.
    """

    def __init__(self, name: str, role: str, args: tuple[object, ...]) -> None:
        self.name = name
        self._path = role
        self._args = args
        self._role: object | None = None
        self._building = threading.Lock()

    def call(self, method: str, args: tuple[object, ...]) -> Outcome:
        """Runs `method` of the role. Never raises: an AfdError is returned as it is, so that it reaches the caller
        as the same class with the same sentence; anything else is a bug, logged here with its traceback."""
        try:
            return getattr(self._built(), method)(*args), None
        except AfdError as error:
            return None, error
        except Exception as error:
            log.exception("%s failed in %s", self.name, method)
            return None, ClusterError(f"{self.name} failed in {method}: {type(error).__name__}: {error}")

    @property
    def built(self) -> bool:
        """Whether there is a role yet."""
        return self._role is not None

    def _built(self) -> object:
        with self._building:
            if self._role is None:
                self._role = load(self._path)(*self._args)
            return self._role
