"""What becomes of lost workers, turn by turn, with workers that do as they are told and a clock that is set."""

from __future__ import annotations

import pytest

from afd.cluster.host import Handle
from afd.cluster.placement import Seat, wanted
from afd.cluster.reconciler import RETRY_S, Reconciler
from afd.cluster.restarts import Restarts
from afd.cluster.standby import Standbys
from afd.cluster.worker import Worker
from afd.config import Deployment
from afd.errors import ClusterError, PeerLost
from afd.types import FfnAddress, Role
from tests.unit.cluster.scripted import Scripted, address

FFN0, FFN1, ATTENTION0 = Seat(Role.FFN, 0), Seat(Role.FFN, 1), Seat(Role.ATTENTION, 0)


class Scene:
    """A cluster that serves, seen by a reconciler. `at` is what the clock says."""

    def __init__(self, **flags: object) -> None:
        dotted = {key.replace("__", "."): value for key, value in flags.items()}
        deployment = Deployment().with_flags({"topology": "1A2F", "cluster.silent_s": 2.0, **dotted})
        cluster = deployment.cluster
        self.at, self.spawned, self.wakes = 100.0, list[Scripted](), 0
        self.workers = {
            seat: Worker.at(seat, Restarts(cluster.restarts, cluster.restart_window_s)) for seat in wanted(deployment)
        }
        standbys = Standbys(cluster.standby_ffn, self.spawn_named, Restarts(2, 60.0), cluster.silent_s)
        self.reconciler = Reconciler(deployment, self.workers, self.spawn, standbys, self.wake)
        for seat, worker in self.workers.items():
            handle = Scripted(seat.name)
            worker.begins(handle, handle.submit("start"), self.at, self.wake)
            worker.started(address(handle, seat) if seat.role is Role.FFN else "127.0.0.1:1")
            worker.serves()
        self.meet()
        self.turn()

    def wake(self) -> None:
        self.wakes += 1

    def spawn(self, seat: Seat) -> Handle:
        return self.spawn_named(seat.name)

    def spawn_named(self, name: str) -> Handle:
        self.spawned.append(Scripted(name))
        return self.spawned[-1]

    def handle(self, seat: Seat) -> Scripted:
        handle = self.workers[seat].handle
        assert isinstance(handle, Scripted)
        return handle

    def meet(self) -> None:
        """The attention worker has a link to every FFN worker that serves."""
        living = [w.ffn_address for s, w in self.workers.items() if s.role is Role.FFN and w.ffn_address]
        self.handle(ATTENTION0).says = {"state": "ready", "message": "", "ffn_living": tuple(living)}

    def turn(self, seconds: float = 0.25, times: int = 1) -> None:
        for _ in range(times):
            self.at += seconds
            self.reconciler.turn(self.at)

    def state(self, seat: Seat) -> tuple[str, str]:
        view = self.workers[seat].shown()
        return view.state, view.message


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_all_is_left_alone_while_all_serve(scene: Scene) -> None:
    scene.turn(times=20)
    assert not scene.spawned
    assert [scene.state(seat) for seat in scene.workers] == [("ready", "")] * 3


def test_a_dead_ffn_worker_is_started_again_and_the_attention_worker_meets_it(scene: Scene) -> None:
    scene.handle(FFN1).gone = "ffn_rank 1 (pid 7) exited with signal 9"
    scene.turn()
    assert scene.state(FFN1) == ("starting", "ffn_rank 1 (pid 7) exited with signal 9; it is started again")
    scene.turn()
    (new,) = scene.spawned
    assert new.asked == ["start"]
    new.ends("start", address(new, FFN1))
    scene.turn()
    scene.turn()
    assert scene.state(FFN1) == ("ready", "")
    method, args, _ = scene.handle(ATTENTION0).calls[-1]
    assert (method, args[0]) == ("reconnect", [address(new, FFN1)])
    scene.handle(ATTENTION0).ends("reconnect")
    scene.meet()
    scene.turn(times=8)
    assert scene.handle(ATTENTION0).asked.count("reconnect") == 1


def test_a_silent_worker_is_killed_before_another_takes_its_seat(scene: Scene) -> None:
    frozen = scene.handle(FFN0)
    frozen.says = None
    scene.turn(times=8)
    assert not frozen.killed
    scene.turn(times=4)
    assert frozen.killed
    assert [h.name for h in scene.spawned] == ["ffn_rank 0"]
    assert "has not answered for" in scene.state(FFN0)[1]
    assert "cluster.silent_s" in scene.state(FFN0)[1]


def test_a_worker_that_ray_has_not_placed_yet_is_not_silent_but_late_in_the_end() -> None:
    scene = Scene(cluster__start_s=100.0)
    scene.handle(FFN1).gone = "its node went"
    scene.turn(times=2)
    (unplaced,) = scene.spawned
    unplaced.pid, unplaced.says = 0, None
    scene.turn(seconds=1.0, times=95)
    assert not unplaced.killed
    scene.turn(seconds=1.0, times=10)
    assert unplaced.killed
    assert "did not start within 100 s (cluster.start_s)" in scene.state(FFN1)[1]


def test_the_reconcilers_own_absence_is_nobodys_silence(scene: Scene) -> None:
    for seat in scene.workers:
        scene.handle(seat).says = None
    scene.turn()
    scene.turn(seconds=60.0)  # it was frozen itself; answers have not had time to come
    assert not any(scene.handle(seat).killed for seat in scene.workers)


def test_an_ffn_worker_that_owes_an_answer_is_killed_on_the_attention_workers_word(scene: Scene) -> None:
    late = scene.workers[FFN0].ffn_address
    why = "ffn_rank 0 has not answered microbatch 1 for 2 s (transport.deadline_s)"
    status = {"state": "recovering", "message": why, "ffn_living": (), "ffn_suspects": {late: why}}
    scene.handle(ATTENTION0).says, hung = status, scene.handle(FFN0)
    scene.turn()
    assert hung.killed
    assert scene.state(ATTENTION0) == ("recovering", why)
    scene.turn()
    scene.spawned[0].ends("start", address(scene.spawned[0], FFN0))
    scene.turn(times=3)  # what the attention worker says is of a life that is over
    assert not scene.spawned[0].killed
    assert len(scene.spawned) == 1


def test_a_link_that_broke_between_two_that_live_is_mended_and_tried_again(scene: Scene) -> None:
    lost = scene.workers[FFN1].ffn_address
    scene.handle(ATTENTION0).says = {
        "state": "recovering",
        "message": "",
        "ffn_living": (scene.workers[FFN0].ffn_address,),
    }
    scene.turn()
    assert scene.handle(ATTENTION0).calls[-1][:2] == ("reconnect", ([lost], 2.0))
    scene.handle(ATTENTION0).ends("reconnect", PeerLost("ffn_rank 1 is gone", peer="ffn_rank 1"))
    scene.turn(seconds=RETRY_S / 4)
    assert scene.handle(ATTENTION0).asked.count("reconnect") == 1
    scene.turn(seconds=RETRY_S)
    assert scene.handle(ATTENTION0).asked.count("reconnect") == 2
    assert not scene.spawned


def test_a_dead_attention_worker_comes_back_with_a_new_address_once_every_rank_serves(scene: Scene) -> None:
    scene.handle(ATTENTION0).gone = scene.handle(FFN0).gone = "gone"
    scene.turn(times=2)
    by_name = {handle.name: handle for handle in scene.spawned}
    attention, ffn = by_name["attention_rank 0"], by_name["ffn_rank 0"]
    attention.ends("start", "127.0.0.1:2")
    scene.turn(times=2)
    assert attention.asked == ["start"], "it was connected to half a layer"
    ffn.ends("start", address(ffn, FFN0))
    scene.turn(times=2)
    assert attention.asked == ["start", "connect"]
    assert {a.ffn_rank for a in attention.calls[1][1][0]} == {0, 1}  # type: ignore[attr-defined]
    attention.ends("connect", PeerLost("ffn_rank 0 is gone", peer="ffn_rank 0"))
    scene.turn(times=2)
    scene.turn(seconds=RETRY_S)
    assert attention.asked == ["start", "connect", "connect"]
    assert scene.state(ATTENTION0)[0] == "starting"
    attention.ends("connect")
    scene.turn()
    assert scene.state(ATTENTION0) == ("ready", "")
    assert scene.workers[ATTENTION0].shown().address == "127.0.0.1:2"


def test_an_engine_that_gave_up_is_replaced(scene: Scene) -> None:
    lost = scene.handle(ATTENTION0)
    lost.says = {"state": "lost", "message": "nobody came (cluster.recover_s)"}
    scene.turn(times=2)
    assert lost.killed
    assert [handle.name for handle in scene.spawned] == ["attention_rank 0"]


def test_a_worker_that_never_lives_long_is_given_up_with_a_sentence() -> None:
    scene = Scene(cluster__restarts=3)
    scene.handle(FFN1).gone = "ffn_rank 1 crashed"
    scene.turn()
    for _ in range(60):
        for handle in scene.spawned:
            handle.gone = "ffn_rank 1 crashed"
        scene.turn()
    assert len(scene.spawned) == 3
    state, message = scene.state(FFN1)
    assert state == "lost"
    assert message.startswith("ffn_rank 1 crashed; it has been started again 3 times within 600 s and is given up")
    assert [scene.state(seat)[0] for seat in (FFN0, ATTENTION0)] == ["ready", "ready"]


def test_a_standby_that_is_prepared_takes_the_seat_and_is_replaced_itself() -> None:
    scene = Scene(cluster__standby_ffn=1)
    (standby,) = scene.spawned
    assert standby.asked == ["prepare"]
    standby.ends("prepare")
    scene.handle(FFN1).gone = "gone"
    scene.turn(times=2)
    assert (standby.name, standby.calls[-1][:2]) == ("ffn_rank 1", ("start", (1,)))
    assert scene.handle(FFN1) is standby
    assert [handle.name for handle in scene.spawned[1:]] == ["ffn standby 0"]
    scene.handle(FFN0).gone = "gone"
    scene.turn(times=2)  # the next one is not prepared yet
    assert scene.handle(FFN0).asked == ["start"]
    assert len(scene.spawned) == 3


def test_a_standby_that_dies_or_hangs_is_replaced_and_one_that_cannot_prepare_is_given_up() -> None:
    scene = Scene(cluster__standby_ffn=1)
    scene.spawned[0].gone = "a standby exited"
    scene.turn(times=2)
    scene.spawned[1].ends("prepare")
    scene.spawned[1].says = None
    scene.turn(times=12)
    assert scene.spawned[1].killed
    assert len(scene.spawned) == 3
    scene.spawned[2].ends("prepare", ClusterError("no plan"))
    scene.turn(times=20)
    assert len(scene.spawned) == 3, "two restarts were allowed"


def test_of_two_replicas_only_the_lost_one_is_replaced() -> None:
    scene = Scene(ffn__replicas=2, topology="1A1F")
    second = Seat(Role.FFN, 0, 1)
    scene.handle(second).gone = "gone"
    scene.turn(times=2)
    (new,) = scene.spawned
    new.ends("start", FfnAddress(0, inproc="new"))
    scene.turn(times=2)
    assert scene.handle(ATTENTION0).calls[-1][1][0] == [FfnAddress(0, inproc="new", replica=1)]
    assert scene.state(ATTENTION0)[0] == "ready"
