"""The tuner settles on the number of microbatches that is fastest for a load, and follows when that changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from attention_worker.tuner import MicrobatchTuner

Rate = Callable[[int], float]


class Pipeline:
    """A clock that runs as fast as `rate(number of microbatches)` tokens per second says."""

    def __init__(self, tuner: MicrobatchTuner, noise: float = 0.0) -> None:
        self.tuner = tuner
        self.now_s = 0.0
        self.noise = noise
        self.rng = random.Random(0)

    def run(self, seconds: float, running: int, rate: Rate, prompt_tokens: int = 0) -> list[int]:
        """The choice after each step."""
        choices, until_s = [], self.now_s + seconds
        while self.now_s < until_s:
            tokens = -(-running // self.tuner.choice)
            speed = rate(self.tuner.choice) * self.rng.uniform(1 - self.noise, 1 + self.noise)
            self.now_s += tokens / speed
            choices.append(self.tuner.observe(self.now_s, tokens, running, prompt_tokens))
        return choices


def best_at(best: int, penalty: float = 0.15) -> Rate:
    return lambda n: 1000 * (1 - penalty * abs(n - best))


@pytest.mark.parametrize("best", [1, 2, 3, 4])
def test_it_settles_on_the_best_number_and_stays(best: int) -> None:
    pipeline = Pipeline(MicrobatchTuner(4), noise=0.05)
    pipeline.run(10.0, 64, best_at(best))
    settled = pipeline.run(60.0, 64, best_at(best))
    share = settled.count(best) / len(settled)
    assert share > 0.9, f"{share:.0%} of the steps ran with {best} microbatches"


def test_each_load_has_its_own_answer() -> None:
    pipeline = Pipeline(MicrobatchTuner(4))
    for _ in range(2):
        pipeline.run(10.0, 4, best_at(1))
        pipeline.run(10.0, 100, best_at(3))
    assert pipeline.run(0.5, 4, best_at(1))[-1] == 1
    assert pipeline.run(0.5, 100, best_at(3))[-1] == 3


def test_a_better_number_that_appears_later_is_found() -> None:
    pipeline = Pipeline(MicrobatchTuner(4))
    pipeline.run(10.0, 64, best_at(2))
    pipeline.run(60.0, 64, best_at(4))
    assert pipeline.tuner.choice == 4


def test_noise_alone_does_not_move_it() -> None:
    pipeline = Pipeline(MicrobatchTuner(4), noise=0.02)
    choices = pipeline.run(100.0, 64, lambda _: 1000.0)
    assert choices.count(3) / len(choices) > 0.85


def test_steps_with_prompts_are_no_evidence() -> None:
    pipeline = Pipeline(MicrobatchTuner(4))
    assert set(pipeline.run(20.0, 64, best_at(4), prompt_tokens=128)) == {pipeline.tuner.first_guess(64)}


def test_it_keeps_to_its_bound() -> None:
    pipeline = Pipeline(MicrobatchTuner(3))
    assert set(pipeline.run(30.0, 64, lambda n: 100.0 * n)) <= {1, 2, 3}
    assert pipeline.tuner.choice == 3
