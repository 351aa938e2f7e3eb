"""Asks one worker how it is, one question at a time, and counts how long it has been silent."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from afd.cluster.host import Handle

LONGEST_LOOK_S = 1.0  # more between two looks is this process's own absence, and no silence of the worker


class Probe:
    """Of one worker's one life. `wake` is called, in any thread, when a question failed."""

    def __init__(self, handle: Handle, wake: Callable[[], None] = lambda: None) -> None:
        self._handle = handle
        self._wake = wake
        self._question: Future[Any] | None = None
        self._looked_s = 0.0
        self.silent_s = 0.0  # since the question that is open was asked

    def look(self, now_s: float) -> dict[str, Any] | None:
        """The status that came since the last look, if one did; asks again. Raises ClusterError, which says how it
        went, when the worker is gone."""
        if self._question is None:
            self._question, self.silent_s = self._handle.submit("status"), 0.0
            self._question.add_done_callback(lambda done: self._wake() if done.exception() else None)
            self._looked_s = now_s
        elif not self._question.done():
            self.silent_s += min(now_s - self._looked_s, LONGEST_LOOK_S)
            self._looked_s = now_s
        if not self._question.done():
            return None
        answer, self._question, self.silent_s = self._question, None, 0.0
        status: dict[str, Any] = answer.result()
        return status
