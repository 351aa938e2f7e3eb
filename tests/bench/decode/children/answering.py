"""The child's side of a candidate in a process of its own: one JSON line for each run.

Standard library only, since each child runs in the Python that has its library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def answers() -> Callable[[Mapping[str, Any]], None]:
    """What writes one answer. From here on, whatever else is printed goes to standard error."""
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(message: Mapping[str, Any]) -> None:
        private.write(json.dumps(message) + "\n")
        private.flush()

    return answer


def serve(
    answer: Callable[[Mapping[str, Any]], None], run: Callable[[list[list[int]], int], list[list[float]] | None]
) -> None:
    """Runs what standard input asks for until it ends. `run` takes prompts and a number of tokens, and gives each
    stream's tokens' times (time.perf_counter) or nothing."""
    answer({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        arrivals = run(asked["prompts"], asked["tokens"])
        answer({"seconds": time.perf_counter() - began, "arrivals": arrivals or []})
