"""How often a worker may be started again, and how soon. No clock of its own: times are handed in."""

from __future__ import annotations

from collections import deque

AT_ONCE = 2  # restarts without a pause; then each waits twice as long as the one before
FIRST_S, LONGEST_S = 0.5, 30.0


class Restarts:
    """Counts one worker's restarts: at most `most` within any `window_s` seconds."""

    def __init__(self, most: int, window_s: float) -> None:
        self.most = most
        self.window_s = window_s
        self._at_s: deque[float] = deque()

    def delay_s(self, now_s: float) -> float | None:
        """Seconds to wait before the restart that is due now, which is counted; None: it was one too many."""
        while self._at_s and self._at_s[0] <= now_s - self.window_s:
            self._at_s.popleft()
        if len(self._at_s) >= self.most:
            return None
        waits = len(self._at_s) - AT_ONCE
        self._at_s.append(now_s)
        return 0.0 if waits < 0 else min(FIRST_S * 2.0**waits, LONGEST_S)

    def verdict(self) -> str:
        """The end of the sentence on a worker that is given up."""
        if not self.most:
            return "it is not started again (cluster.restarts is 0)"
        return (
            f"it has been started again {self.most} times within {self.window_s:g} s and is given up "
            f"(cluster.restarts, cluster.restart_window_s)"
        )
