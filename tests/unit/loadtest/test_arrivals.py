"""When requests are sent: the distribution of the gaps, and the rate they add up to."""

from __future__ import annotations

import statistics
from itertools import islice, pairwise

import pytest

from afd.errors import ConfigError
from afd.loadtest import arrivals
from afd.loadtest.arrivals import Ramp


def gaps(kind: str, burstiness: float = 1.0, rate: float = 20.0, count: int = 20_000) -> list[float]:
    times = [0.0, *islice(arrivals.steady(rate, kind, burstiness, seed=3), count)]
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize(("kind", "burstiness"), [("constant", 1.0), ("poisson", 1.0), ("gamma", 0.3), ("gamma", 4.0)])
def test_every_kind_of_gap_has_the_rate_asked_for(kind: str, burstiness: float) -> None:
    assert statistics.fmean(gaps(kind, burstiness)) == pytest.approx(1 / 20.0, rel=0.04)


@pytest.mark.parametrize(
    ("kind", "burstiness", "variation"),
    [("constant", 1.0, 0.0), ("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)],
)
def test_gaps_vary_as_their_distribution_does(kind: str, burstiness: float, variation: float) -> None:
    """The standard deviation over the mean: 1 for poisson, 1/sqrt(shape) for gamma."""
    found = gaps(kind, burstiness)
    assert statistics.stdev(found) / statistics.fmean(found) == pytest.approx(variation, rel=0.05, abs=1e-6)


def test_poisson_gaps_are_exponential() -> None:
    found = gaps("poisson", rate=1.0)
    for seconds, share in [(0.1, 0.0952), (0.5, 0.3935), (1.0, 0.6321), (3.0, 0.9502)]:
        assert sum(gap <= seconds for gap in found) / len(found) == pytest.approx(share, abs=0.012)


def test_arrivals_are_a_function_of_the_seed() -> None:
    one, same, other = (list(islice(arrivals.steady(5.0, "poisson", 1.0, seed), 50)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.parametrize("ramp", [Ramp(2.0, 30.0, 10.0), Ramp(30.0, 2.0, 10.0), Ramp(0.0, 32.0, 10.0)])
def test_a_ramp_has_the_rate_that_a_line_between_its_ends_has(ramp: Ramp) -> None:
    times = list(arrivals.climbing(ramp, "constant", 1.0, seed=0))
    assert len(times) == pytest.approx(160, abs=1)
    assert times == sorted(times)
    assert times[-1] <= 10.0
    for begin, end in [(0.0, 5.0), (5.0, 10.0), (2.0, 4.0)]:
        middle = ramp.from_rate + (ramp.to_rate - ramp.from_rate) * (begin + end) / 2 / 10.0
        assert sum(begin < at <= end for at in times) == pytest.approx(middle * (end - begin), abs=1.5)


def test_a_ramp_without_slope_is_a_constant_rate() -> None:
    assert list(arrivals.climbing(Ramp(4.0, 4.0, 2.0), "constant", 1.0, 0)) == pytest.approx(
        [i / 4 for i in range(1, 9)]
    )


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "a:b:c", "0:0:5", "-1:2:5", "1:2:0", "1:nan:5"])
def test_a_ramp_that_cannot_be_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--ramp"):
        Ramp.parse(text)


@pytest.mark.parametrize(
    ("rate", "kind", "burstiness", "flag"),
    [(0.0, "poisson", 1.0, "--rate"), (1.0, "weibull", 1.0, "--arrivals"), (1.0, "gamma", 0.0, "--burstiness")],
)
def test_what_cannot_be_is_refused_by_name(rate: float, kind: str, burstiness: float, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        next(arrivals.steady(rate, kind, burstiness, 0))
