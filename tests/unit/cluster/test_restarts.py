from __future__ import annotations

from afd.cluster.restarts import Restarts


def test_the_first_restarts_are_at_once_and_later_ones_wait_longer_and_longer() -> None:
    restarts = Restarts(most=10, window_s=600.0)
    assert [restarts.delay_s(float(i)) for i in range(7)] == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0]


def test_one_restart_too_many_within_the_window_is_refused_and_says_which_knobs() -> None:
    restarts = Restarts(most=3, window_s=60.0)
    assert None not in [restarts.delay_s(now) for now in (0.0, 10.0, 20.0)]
    assert restarts.delay_s(59.0) is None
    assert "3 times within 60 s" in restarts.verdict()
    assert "cluster.restarts" in restarts.verdict()
    assert restarts.delay_s(61.0) is not None, "the first one is long ago by now"


def test_no_restarts_at_all() -> None:
    restarts = Restarts(most=0, window_s=60.0)
    assert restarts.delay_s(0.0) is None
    assert restarts.verdict() == "it is not started again (cluster.restarts is 0)"
