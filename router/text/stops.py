"""Stop strings in text that arrives in pieces. The result does not depend on where the pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back text that may be the beginning of a stop string, until it is known not to be.

    The stop string whose last character comes first ends the text; of two that end together, the one that begins
    first. Text from the stop string on is never given out, except, with `keep`, the stop string itself.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._keep = keep

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is now certain, and the stop string that was found (after which nothing more is pushed)."""
        if not self._stops or not text:
            return text, None
        buffer = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            end, at, stop = min(found)
            return buffer[: end if self._keep else at], stop
        held = self._length_to_hold(buffer)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held], None

    def flush(self) -> str:
        """What is still held back, when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _length_to_hold(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that is the beginning of a stop string."""
        for length in range(min(len(buffer), self._longest - 1), 0, -1):
            if any(stop.startswith(buffer[-length:]) for stop in self._stops):
                return length
        return 0
