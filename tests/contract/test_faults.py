"""The in-process transport's faults do what they say."""

from __future__ import annotations

import time

import pytest
import torch

from afd.errors import PeerLost, PeerTimeout
from afd.transport.local import Faults
from tests.contract.pairs import HELLO, SOON_S, attention, collect, ffn_worker, tokens


@pytest.mark.parametrize("reorder", [False, True])
def test_delayed_and_reordered_frames_still_add_up(reorder: bool) -> None:
    faults = Faults(delay_s=0.003, reorder=reorder, seed=5)
    orders = set()
    with ffn_worker("inproc", faults=faults) as ffn, attention("inproc", [ffn.port.address], faults=faults) as port:
        for step in range(20):
            for m in range(HELLO.microbatches):
                port.dispatch(m, step, 0, tokens(3, seed=step + m), None, None)
            answers = [collect(port) for _ in range(HELLO.microbatches)]
            for a in answers:
                assert a.hidden is not None
                assert torch.equal(a.hidden, tokens(3, seed=step + a.microbatch) * 2)
            orders.add(tuple(a.microbatch for a in answers))
    assert (len(orders) > 1) is reorder


def test_delay_is_not_paid_by_the_sender() -> None:
    faults = Faults(delay_s=5.0)
    with ffn_worker("inproc") as ffn, attention("inproc", [ffn.port.address], faults=faults) as port:
        start = time.monotonic()
        port.dispatch(0, 0, 0, tokens(3), None, None)
        assert time.monotonic() - start < 1.0


def test_a_dropped_frame_ends_at_the_deadline() -> None:
    with (
        ffn_worker("inproc", faults=Faults(drop=1.0)) as ffn,
        attention("inproc", [ffn.port.address], deadline_s=0.1) as port,
    ):
        port.dispatch(0, 0, 0, tokens(3), None, None)
        with pytest.raises(PeerTimeout, match="ffn_rank 0 has not answered"):
            port.collect(SOON_S)


def test_some_frames_are_dropped_by_the_same_dice_each_time() -> None:
    def fates() -> list[bool]:
        came = []
        for step in range(12):
            faults = Faults(drop=0.5, seed=step)
            with ffn_worker("inproc", faults=faults) as ffn, attention("inproc", [ffn.port.address]) as port:
                port.dispatch(0, step, 0, tokens(1), None, None)
                came.append(port.collect(0.1) is not None)
        return came

    first = fates()
    assert {True, False} == set(first)
    assert fates() == first


def test_a_cut_link_is_lost_for_both_sides() -> None:
    with ffn_worker("inproc", faults=Faults(cut_after=2)) as ffn, attention("inproc", [ffn.port.address]) as port:
        for step in range(2):
            port.dispatch(0, step, 0, tokens(3), None, None)
            collect(port)
        port.dispatch(0, 2, 0, tokens(3), None, None)
        with pytest.raises(PeerLost, match="ffn_rank 0"):
            port.collect(SOON_S)
        end = time.monotonic() + SOON_S
        while ffn.port.connected:
            assert time.monotonic() < end
