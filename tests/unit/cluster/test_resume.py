"""Who keeps the seat when a new controller takes over."""

from __future__ import annotations

from afd.cluster.placement import Seat, wanted
from afd.cluster.restarts import Restarts
from afd.cluster.resume import resume
from afd.cluster.worker import Phase, Worker
from afd.config import Deployment
from afd.types import FfnAddress, Role
from tests.unit.cluster.scripted import Scripted

FFN0, FFN1, ATTENTION0 = Seat(Role.FFN, 0), Seat(Role.FFN, 1), Seat(Role.ATTENTION, 0)


def seats(**flags: object) -> dict[Seat, Worker]:
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    deployment = Deployment().with_flags({"topology": "1A2F", **dotted})
    return {seat: Worker.at(seat, Restarts(10, 600.0)) for seat in wanted(deployment)}


def serving(name: str, at: object, state: str = "ready") -> Scripted:
    handle = Scripted(name)
    handle.says = {"state": state, "message": "", "address": at}
    return handle


def test_where_nobody_is_left_nothing_is_resumed() -> None:
    workers = seats()
    assert not resume(workers, [], 0.1)
    assert all(worker.handle is None for worker in workers.values())


def test_who_serves_keeps_the_seat_and_who_does_not_is_ended_and_started_again() -> None:
    workers = seats()
    attention = serving("attention_rank 0", "127.0.0.1:9", "recovering")
    ffn, starting, silent = serving("ffn_rank 0", FfnAddress(0, inproc="a")), serving("ffn_rank 1", None), Scripted("x")
    silent.says = None
    left = [(handle.name, handle) for handle in (attention, ffn, starting, silent)]
    assert resume(workers, left, 0.1)
    assert workers[ATTENTION0].handle is attention
    assert (workers[ATTENTION0].view.state, workers[ATTENTION0].view.address) == ("recovering", "127.0.0.1:9")
    assert workers[FFN0].ffn_address == FfnAddress(0, inproc="a")
    assert [workers[seat].phase for seat in (FFN0, FFN1)] == [Phase.SERVING, Phase.WAITING]
    assert [handle.killed for handle in (attention, ffn, starting, silent)] == [False, False, True, True]


def test_a_standby_that_took_a_rank_has_its_seat_and_an_idle_one_none() -> None:
    workers = seats(ffn__replicas=2)
    took, idle = serving("ffn standby 0", FfnAddress(1, inproc="b")), serving("ffn standby 0", None, "starting")
    named = serving("ffn_rank 1", FfnAddress(1, inproc="c"))
    assert resume(workers, [(handle.name, handle) for handle in (named, took, idle)], 0.1)
    assert workers[FFN1].handle is named
    assert workers[Seat(Role.FFN, 1, 1)].handle is took
    assert took.name == "ffn_rank 1 replica 1"
    assert idle.killed
