from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.topology import FfnShard, Topology, ffn_shards
from afd.types import Cut


@pytest.mark.parametrize(("text", "attention", "ffn"), [("2A1F", 2, 1), ("1a4f", 1, 4), (" 10A 12F ", 10, 12)])
def test_a_topology_is_read_and_written_back(text: str, attention: int, ffn: int) -> None:
    topology = Topology.parse(text)
    assert (topology.attention, topology.ffn) == (attention, ffn)
    assert str(topology) == f"{attention}A{ffn}F"


@pytest.mark.parametrize("text", ["", "2", "A1F", "2F1A", "0A1F", "1A00F", "-1A1F", "1.5A1F", "1A1FF"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="like 2A1F"):
        Topology.parse(text)


@given(ep=st.integers(1, 5), tp=st.integers(1, 5), length=st.integers(0, 64), by=st.sampled_from(["ep", "tp", "rank"]))
def test_the_slices_of_an_axis_cover_it_once_and_differ_by_one_at_most(ep: int, tp: int, length: int, by: str) -> None:
    shards = [FfnShard(rank, ep, tp) for rank in range(ep * tp)]
    bounds = sorted({shard.bounds(length, by) for shard in shards})  # type: ignore[arg-type]
    owned = [index for first, end in bounds for index in range(first, end)]
    assert owned == list(range(length))
    sizes = {
        end - first
        for first, end in (s.bounds(length, by) for s in shards)  # type: ignore[arg-type]
    }
    assert max(sizes) - min(sizes) <= 1


def test_a_hybrid_rank_owns_its_experts_and_its_slice_of_each() -> None:
    shard = ffn_shards(4, "hybrid", 8)[3]
    assert (shard.ep, shard.tp, shard.ep_rank, shard.tp_rank) == (2, 2, 1, 1)
    assert shard.slices((8, 6, 5), (Cut(0, "ep"), Cut(1, "tp"))) == (slice(4, 8), slice(3, 6), slice(0, 5))


@pytest.mark.parametrize(
    ("num_ffn", "sharding", "tp", "degrees"),
    [(4, "ep", None, (4, 1)), (3, "tp", None, (1, 3)), (6, "hybrid", None, (3, 2)), (8, "hybrid", 4, (2, 4))],
)
def test_sharding_sets_the_degrees(num_ffn: int, sharding: str, tp: int | None, degrees: tuple[int, int]) -> None:
    shards = ffn_shards(num_ffn, sharding, 24, tp)  # type: ignore[arg-type]
    assert [(s.ep, s.tp) for s in shards] == [degrees] * num_ffn
    assert [s.ffn_rank for s in shards] == list(range(num_ffn))


def test_experts_that_do_not_divide_are_refused_with_the_degrees_that_would() -> None:
    with pytest.raises(ConfigError, match=r"8 experts do not divide over 3 EP groups .* out of 1, 2, 4, 8"):
        ffn_shards(3, "ep", 8)
    assert len(ffn_shards(3, "ep", 0)) == 3, "a dense model has no experts to divide"


def test_hybrid_that_is_not_hybrid_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs an EP and a TP degree above 1"):
        ffn_shards(3, "hybrid", 6)
    with pytest.raises(ConfigError, match=r"ffn.tp 3 does not divide the 4 FFN workers"):
        ffn_shards(4, "hybrid", 8, tp=3)
