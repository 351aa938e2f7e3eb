from __future__ import annotations

from afd.cluster.placement import demand, resources_of, shortage, wanted
from afd.config import Deployment, Resources
from afd.types import Role


def test_every_worker_of_the_topology_is_wanted_once() -> None:
    deployment = Deployment(topology="2A3F")
    seats = [(Role.FFN, 0, 0), (Role.FFN, 1, 0), (Role.FFN, 2, 0), (Role.ATTENTION, 0, 0), (Role.ATTENTION, 1, 0)]
    assert wanted(deployment) == seats


def test_replicas_have_seats_of_their_own_and_standbys_none_but_both_reserve() -> None:
    deployment = Deployment(topology="1A2F").with_flags({"ffn.replicas": 2, "cluster.standby_ffn": 3})
    names = ["ffn_rank 0", "ffn_rank 0 replica 1", "ffn_rank 1", "ffn_rank 1 replica 1", "attention_rank 0"]
    assert [seat.name for seat in wanted(deployment)] == names
    assert demand(deployment) == {"CPU": 8.0}


def deployment_with_gpus() -> Deployment:
    plain = Deployment(topology="2A1F")
    attention = plain.attention.model_copy(update={"resources": Resources(num_cpus=2, custom={"fast_net": 0.5})})
    ffn = plain.ffn.model_copy(update={"resources": Resources(num_cpus=1, num_gpus=4)})
    return plain.model_copy(update={"attention": attention, "ffn": ffn})


def test_the_demand_adds_up_over_all_workers_and_leaves_out_what_is_zero() -> None:
    assert demand(deployment_with_gpus()) == {"CPU": 5.0, "GPU": 4.0, "fast_net": 1.0}
    assert demand(Deployment(topology="1A1F")) == {"CPU": 2.0}
    assert resources_of(deployment_with_gpus(), Role.FFN).num_gpus == 4


def test_a_card_asked_for_by_type_must_be_there() -> None:
    plain = Deployment(topology="1A2F")
    cards = plain.ffn.model_copy(update={"resources": Resources(num_cpus=1, num_gpus=1, accelerator_type="H20")})
    deployment = plain.model_copy(update={"ffn": cards})
    assert demand(deployment) == {"CPU": 3.0, "GPU": 2.0, "accelerator_type:H20": 0.002}
    have = {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    assert "accelerator_type:H20 (there are 0)" in shortage(deployment, have)
    assert shortage(deployment, have | {"accelerator_type:H20": 1.0}) == ""


def test_a_shortage_names_what_is_missing_how_much_there_is_and_the_knobs() -> None:
    sentence = shortage(deployment_with_gpus(), {"CPU": 8.0, "GPU": 1.0, "fast_net": 1.0})
    assert sentence == "2A1F needs 4 GPU (there are 1); change topology, attention.resources or ffn.resources"
    assert shortage(deployment_with_gpus(), {"CPU": 5.0, "GPU": 4.0, "fast_net": 1.0}) == ""
