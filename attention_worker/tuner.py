"""Finds the number of microbatches by trying: the running pipeline says how many tokens per second each gives.

No tensors. More microbatches hide the wire and the other side; fewer read the weights less often. Which wins depends on
the model, the machine and the load, so each load (the number of running requests, by powers of two) has its own answer.
Rates are taken over windows of steady decoding; a neighbour of the best number is tried now and then, and wins by a
margin only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW_S = 0.25  # a rate is taken over at least this long,
WINDOW_STEPS = 8  # and this many steps
MARGIN = 1.03  # better by less is noise
PATIENCE = 100  # windows at the best number before its neighbours are tried again
FOR_PROMPTS = 3  # prompts have rows enough for any number: as many as hide the other side and the wire
MEMORY = 0.5  # weight of the newest rate


@dataclass
class _Load:
    """What is known for one load."""

    best: int
    rates: dict[int, float] = field(default_factory=dict)  # tokens/s by number of microbatches
    untried: list[int] = field(default_factory=list)
    settled_windows: int = 0

    def neighbours(self, most: int) -> list[int]:
        return [n for n in (self.best + 1, self.best - 1) if 1 <= n <= most]


class MicrobatchTuner:
    """`choice` is the number to use now, 1 … most. Fed by one thread, once a step."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._loads: dict[int, _Load] = {}
        self._load: _Load | None = None
        self.choice = min(most, FOR_PROMPTS)
        self._open_window(None)

    def first_guess(self, running: int) -> int:
        """Where to begin: a microbatch of few rows is bound by reading the weights, whatever it is split into."""
        return min(self.most, 1 if running < 16 else 2 if running < 64 else 3)

    def observe(self, now_s: float, tokens: int, running: int, prompt_tokens: int) -> int:
        """A step gave `tokens` tokens while `running` requests ran; `prompt_tokens` of prompts were computed in it.
        Returns the number to use from now on."""
        load = self._loads.get(key := running.bit_length())
        if load is None:
            load = self._loads[key] = _Load(self.first_guess(running))
            load.untried = load.neighbours(self.most)
        fresh = load is not self._load
        if fresh:
            self._load, self.choice = load, load.best
            self._open_window(None)
        if prompt_tokens:
            self._open_window(None)  # prompts among the decodes say nothing about decoding
            return max(self.choice, min(self.most, FOR_PROMPTS))
        if not fresh:
            self._count(now_s, tokens, load)
        return self.choice

    def _count(self, now_s: float, tokens: int, load: _Load) -> None:
        """Takes a step of steady decoding in."""
        if self._since_s is None:
            # The first steps after a change belong to the number before it.
            self._settling += 1
            if self._settling > self.most:
                self._open_window(now_s)
            return
        self._tokens += tokens
        self._steps += 1
        if now_s - self._since_s >= WINDOW_S and self._steps >= WINDOW_STEPS:
            self._close_window(load, self._tokens / (now_s - self._since_s))
            self._open_window(now_s if self.choice == self._measured else None)

    def _open_window(self, since_s: float | None) -> None:
        self._since_s = since_s
        self._tokens = self._steps = self._settling = 0
        self._measured = self.choice

    def _close_window(self, load: _Load, rate: float) -> None:
        """Takes a rate in, and decides what to run next."""
        old = load.rates.get(self.choice)
        load.rates[self.choice] = rate if old is None else old + MEMORY * (rate - old)
        if self.choice != load.best:  # a trial is over
            if load.rates[self.choice] > MARGIN * load.rates[load.best]:
                load.best = self.choice
                load.untried = [n for n in load.neighbours(self.most) if n not in load.rates]
            self.choice = load.best
            return
        load.settled_windows += 1
        if load.untried:
            self.choice = load.untried.pop(0)
        elif load.settled_windows >= PATIENCE:
            load.settled_windows = 0
            load.untried = load.neighbours(self.most)
            for n in load.untried:
                load.rates.pop(n, None)
