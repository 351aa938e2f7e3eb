from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import CheckpointError
from afd.topology import FfnShard, ffn_shards
from afd.types import Cut, DType, Role, TensorSpec
from afd.weights.headers import TensorInfo
from afd.weights.ownership import check, cover_faults, owned, role_bytes


def infos_of(specs: list[TensorSpec]) -> dict[str, TensorInfo]:
    return {s.name: TensorInfo(s.shape, "F32", 0, Path("x")) for s in specs if not s.optional}


def test_a_checkpoint_with_exactly_the_needed_tensors_passes(specs: list[TensorSpec]) -> None:
    check(specs, infos_of(specs), "x")


def test_missing_left_over_and_misshapen_tensors_are_counted_and_the_first_few_named(specs: list[TensorSpec]) -> None:
    infos = infos_of(specs)
    for name in list(infos)[:4]:
        del infos[name]
    infos["model.layers.9.surprise.weight"] = TensorInfo((1,), "F32", 4, Path("x"))
    infos["model.layers.1.moe.up_proj.weight"] = TensorInfo((4, 7, 8), "F32", 0, Path("x"))
    with pytest.raises(CheckpointError) as caught:
        check(specs, infos, "the-file")
    text = str(caught.value)
    assert "the-file" in text
    assert (
        "4 tensors missing: model.embed_tokens.weight; model.norm.weight; model.layers.0.self_attn.q_proj.weight; ..."
        in text
    )
    assert "1 tensors left over that no part of the model owns: model.layers.9.surprise.weight" in text
    assert "model.layers.1.moe.up_proj.weight is [4, 7, 8] and should be [4, 6, 8]" in text


def test_rotary_tables_and_the_copy_of_a_tied_head_may_be_left_over(specs: list[TensorSpec]) -> None:
    infos = infos_of(specs)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "lm_head.weight"):
        infos[name] = TensorInfo((16, 8), "F32", 0, Path("x"))
    check(specs, infos, "x")
    check([s for s in specs if not s.optional], infos, "x")


def test_an_attention_worker_owns_no_ffn_tensor_and_an_ffn_worker_only_those(specs: list[TensorSpec]) -> None:
    assert {s.role for s, _ in owned(specs, Role.ATTENTION, None)} == {Role.ATTENTION}
    assert {s.role for s, _ in owned(specs, Role.FFN, FfnShard(0, 2, 2))} == {Role.FFN}


def test_an_ep_rank_owns_the_same_experts_stacked_or_in_tensors_of_their_own(specs: list[TensorSpec]) -> None:
    mine = owned(specs, Role.FFN, FfnShard(1, ep=2, tp=1))
    assert [s.expert for s, _ in mine if s.expert is not None] == [2, 3]
    index = next(i for s, i in mine if s.name == "model.layers.1.moe.up_proj.weight")
    assert index == (slice(2, 4), slice(0, 6), slice(0, 8))


@given(experts=st.integers(1, 12), inner=st.integers(1, 20), ranks=st.integers(1, 9), data=st.data())
def test_all_roles_together_cover_every_tensor_exactly_once(
    experts: int, inner: int, ranks: int, data: st.DataObject
) -> None:
    tp = data.draw(st.sampled_from([d for d in range(1, ranks + 1) if ranks % d == 0]))
    shards = [FfnShard(r, ranks // tp, tp) for r in range(ranks)]
    specs = [
        TensorSpec("attention", (3, 5), Role.ATTENTION),
        TensorSpec("stacked", (experts, inner, 2), Role.FFN, (Cut(0, "ep"), Cut(1, "tp"))),
        TensorSpec("dense", (2, inner), Role.FFN, (Cut(1, "rank"),)),
        *(TensorSpec(f"expert {e}", (inner, 2), Role.FFN, (Cut(0, "tp"),), expert=e) for e in range(experts)),
    ]
    assert cover_faults(specs, shards) == []
    ffn_bytes = sum(role_bytes(specs, Role.FFN, shard, DType.BF16) for shard in shards)
    assert ffn_bytes == 2 * (experts * inner * 2 * 2 + 2 * inner)


def test_a_tensor_that_several_ranks_read_or_that_nobody_reads_is_a_fault(specs: list[TensorSpec]) -> None:
    shards = list(ffn_shards(4, "hybrid", 4))
    assert cover_faults(specs, shards) == []
    whole = TensorSpec("uncut", (3, 3), Role.FFN)
    only_tp = TensorSpec("cut one way only", (4, 4), Role.FFN, (Cut(0, "tp"),))
    assert cover_faults([whole, only_tp], shards) == [
        "uncut is read more than once",
        "cut one way only is read more than once",
    ]
    assert cover_faults([TensorSpec("gap", (4, 4), Role.FFN, (Cut(0, "rank"),))], shards[1:]) == [
        "gap: 12 of 16 elements are read"
    ]


def test_bytes_per_role_count_what_each_holds_and_no_optional_tensor(specs: list[TensorSpec]) -> None:
    assert role_bytes(specs, Role.ATTENTION, None, DType.FP32) == 4 * (16 * 8 + 8 + 64 + 32)
    one = role_bytes(specs, Role.FFN, FfnShard(0, 1, 1), DType.FP32)
    assert one == 4 * (80 + 80 + 192 + 192 + 48 + 4 * 48)
