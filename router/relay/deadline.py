"""A limit on how long a piece of a task may take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from afd.errors import DeadlineExceeded


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Cancels what the running task waits for in the block after `seconds`, and raises DeadlineExceeded in its place;
    None: no limit. The task must not be one that somebody else counts cancellations of (asyncio.Task.cancelling)."""
    if seconds is None:
        yield
        return
    task = asyncio.current_task()
    assert task is not None, "a deadline is for a task"
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if not expired:
            raise
        raise DeadlineExceeded(f"the request did not finish within its {seconds:g} s") from None
    finally:
        timer.cancel()
