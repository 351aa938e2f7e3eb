from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afd.errors import CheckpointError, ConfigError
from afd.topology import FfnShard, ffn_shards
from afd.torch_dtypes import TORCH_DTYPES
from afd.types import DType, Role, TensorSpec
from afd.weights import dummy
from afd.weights.checkpoint import open_checkpoint
from afd.weights.load import cpu_has_bf16, load, resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, specs: list[TensorSpec]) -> Path:
    return dummy.write_checkpoint(tmp_path / "model", {}, specs, seed=3, shards=2)


def test_an_attention_worker_reads_no_expert_and_an_ffn_worker_no_q_proj(folder: Path, specs: list[TensorSpec]) -> None:
    with open_checkpoint(folder) as checkpoint:
        load(checkpoint, specs, Role.ATTENTION, None, DType.FP32, CPU)
        assert checkpoint.read_names == {s.name for s in specs if s.role is Role.ATTENTION and not s.optional}
    with open_checkpoint(folder) as checkpoint:
        load(checkpoint, specs, Role.FFN, FfnShard(0, ep=2, tp=1), DType.FP32, CPU)
        assert not any("self_attn" in n or "experts.2" in n or "experts.3" in n for n in checkpoint.read_names)
        assert any("experts.1" in n for n in checkpoint.read_names)


def test_the_parts_of_all_ffn_ranks_put_together_are_the_checkpoint(folder: Path, specs: list[TensorSpec]) -> None:
    whole = dummy.weights(specs, seed=3)
    rebuilt = {s.name: torch.full(s.shape, torch.nan) for s in specs if s.role is Role.FFN}
    for shard in ffn_shards(4, "hybrid", 4):
        with open_checkpoint(folder) as checkpoint:
            part = load(checkpoint, specs, Role.FFN, shard, DType.FP32, CPU)
        for spec in specs:
            if spec.name in part:
                rebuilt[spec.name][shard.slices(spec.shape, spec.cuts)] = part[spec.name]
    for name, values in rebuilt.items():
        assert torch.equal(values, whole[name]), name


@pytest.mark.parametrize("dtype", list(DType))
def test_loaded_tensors_are_contiguous_own_their_memory_and_have_the_asked_dtype(
    folder: Path, specs: list[TensorSpec], dtype: DType
) -> None:
    whole = dummy.weights(specs, seed=3)
    shard = FfnShard(1, ep=1, tp=2)
    with open_checkpoint(folder) as checkpoint:
        part = load(checkpoint, specs, Role.FFN, shard, dtype, CPU)
    for spec in specs:
        if spec.role is Role.FFN:
            values = part[spec.name]
            assert values.is_contiguous()
            assert values.untyped_storage().nbytes() == values.nbytes
            expected = whole[spec.name][shard.slices(spec.shape, spec.cuts)].to(TORCH_DTYPES[dtype])
            assert values.dtype == expected.dtype
            assert torch.equal(values, expected)


def test_progress_counts_up_to_the_bytes_loaded(folder: Path, specs: list[TensorSpec]) -> None:
    seen: list[tuple[int, int, str]] = []
    with open_checkpoint(folder) as checkpoint:
        part = load(checkpoint, specs, Role.ATTENTION, None, DType.BF16, CPU, lambda *args: seen.append(args))
    assert [name for _, _, name in seen] == list(part)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in part.values())
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_a_role_refuses_a_checkpoint_that_lacks_the_other_roles_tensors(
    tmp_path: Path, specs: list[TensorSpec]
) -> None:
    dummy.write_checkpoint(tmp_path, {}, specs[:-1], seed=3)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="1 tensors missing"):
        load(checkpoint, specs, Role.ATTENTION, None, DType.FP32, CPU)
    assert not checkpoint.read_names


def test_a_file_replaced_by_a_shorter_one_after_the_check_is_an_error_not_a_crash(
    folder: Path, specs: list[TensorSpec]
) -> None:
    with open_checkpoint(folder) as checkpoint:
        for file in folder.glob("*.safetensors"):
            file.unlink()
            file.write_bytes(b"short")
        with pytest.raises(CheckpointError, match="cannot read tensor"):
            load(checkpoint, specs, Role.ATTENTION, None, DType.FP32, CPU)


def test_dtype_and_device_are_taken_at_their_word_or_found_out(tmp_path: Path) -> None:
    native = DType.BF16 if cpu_has_bf16() else DType.FP32
    assert resolve_dtype("fp32", {"torch_dtype": "bfloat16"}, CPU) is DType.FP32
    assert resolve_dtype("bf16", {"torch_dtype": "float32"}, CPU) is DType.BF16
    assert resolve_dtype("auto", {}, CPU) is native
    assert resolve_dtype("auto", {"torch_dtype": "bfloat16"}, CPU) is native
    assert resolve_dtype("auto", {"dtype": "float32"}, CPU) is DType.FP32
    assert resolve_dtype("auto", {"torch_dtype": "float32"}, CPU) is DType.FP32
    assert resolve_dtype("auto", {"torch_dtype": "float32", "text_config": {"dtype": "bfloat16"}}, CPU) is native
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for flags, native in (
        ("fpu avx512_bf16 sse", True),
        ("amx_bf16", True),
        ("avx512f avx2", False),
        ("bf16_x", False),
    ):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        assert cpu_has_bf16(tmp_path / "cpuinfo") is native
    assert not cpu_has_bf16(tmp_path / "absent")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_where_there_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no CUDA device here"):
        resolve_device("cuda")


def test_dummy_weights_depend_on_name_and_seed_alone(specs: list[TensorSpec]) -> None:
    some, backwards = dummy.weights(specs, seed=1), dummy.weights(specs[::-1], seed=1)
    assert all(torch.equal(some[name], backwards[name]) for name in some)
    assert not torch.equal(some["model.norm.weight"], dummy.weights(specs, seed=2)["model.norm.weight"])
    up, down = some["model.layers.1.moe.up_proj.weight"], some["model.layers.1.moe.down_proj.weight"]
    assert not torch.equal(up.flatten(), down.flatten())
    assert "lm_head.weight" not in some


def test_the_copy_of_a_tied_head_is_left_in_the_file(tmp_path: Path, specs: list[TensorSpec]) -> None:
    dummy.write_checkpoint(tmp_path, {}, [replace(spec, optional=False) for spec in specs], seed=3)
    with open_checkpoint(tmp_path) as checkpoint:
        assert "lm_head.weight" not in load(checkpoint, specs, Role.ATTENTION, None, DType.FP32, CPU)
        assert "lm_head.weight" not in checkpoint.read_names
