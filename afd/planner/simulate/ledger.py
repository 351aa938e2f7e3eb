"""Who got how many tokens, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Ledger:
    """Of every sequence, by number. Times in seconds. `halfway` is called when half of all tokens are there, and maybe
    again later."""

    def __init__(self, halfway: Callable[[], None]) -> None:
        self.asked: list[int] = []
        self.got: list[int] = []
        self.came_s: list[float | None] = []  # None: with its prompt computed, before the beginning
        self.first_s: list[float] = []
        self.last_s: list[float] = []
        self.gaps_s: list[float] = []  # between two tokens of one sequence, of all
        self._halfway = halfway
        self._left = 0
        self._half = 0

    def ask(self, tokens: int, came_s: float | None) -> int:
        """A new sequence, and its number."""
        self.asked.append(tokens)
        self.got.append(0)
        self.came_s.append(came_s)
        self.first_s.append(0.0)
        self.last_s.append(0.0)
        self._left += tokens
        self._half = self._left // 2
        return len(self.asked) - 1

    def took(self, produced: Iterable[int], now_s: float) -> None:
        """A step gave each of these sequences a token."""
        for number in produced:
            if self.got[number]:
                self.gaps_s.append(now_s - self.last_s[number])
            else:
                self.first_s[number] = now_s
            self.got[number] += 1
            self.last_s[number] = now_s
            self._left -= 1
        if self._left <= self._half:
            self._halfway()

    def tpots_s(self) -> list[float]:
        """Seconds per output token of each sequence that got several: the mean of its gaps."""
        times = zip(self.got, self.first_s, self.last_s, strict=True)
        return [(last_s - first_s) / (got - 1) for got, first_s, last_s in times if got > 1]

    def ttfts_s(self) -> list[float]:
        """Seconds from coming to the first token, of those that came without one."""
        return [
            first_s - came_s for came_s, first_s in zip(self.came_s, self.first_s, strict=True) if came_s is not None
        ]
