from __future__ import annotations

import contextlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afd.errors import CheckpointError, UnsupportedModel
from afd.weights.checkpoint import open_checkpoint
from afd.weights.gguf import GgufFile
from tests.unit.weights.tiny_gguf import TinyGguf


def test_every_tensor_and_slice_comes_back_under_its_hugging_face_name(tiny_gguf: TinyGguf) -> None:
    with open_checkpoint(tiny_gguf.write()) as checkpoint:
        assert checkpoint.names().keys() == tiny_gguf.hf.keys()
        for name, values in tiny_gguf.hf.items():
            assert checkpoint.names()[name].shape == values.shape
            assert torch.equal(checkpoint.read(name), torch.from_numpy(values))
            for index in ((slice(3, 7),), (slice(5, 5),), (slice(0, 8), slice(4, 20)))[: values.ndim + 1]:
                index = (*index, *(slice(0, n) for n in values.shape[len(index) :]))
                assert torch.equal(checkpoint.read(name, index), torch.from_numpy(values[index])), (name, index)


def test_llama_cpp_pairs_neighbours_where_hugging_face_pairs_halves(tiny_llama: TinyGguf) -> None:
    """Written down once more from the definition: rotary pair j of a head is rows (2j, 2j+1) there, (j, j+8) here."""
    file = GgufFile(tiny_llama.write())
    stored = next(t.data for t in gguf.GGUFReader(file.path).tensors if t.name == "blk.0.attn_q.weight")
    for head in range(4):
        for pair in range(8):
            for half in range(2):
                row = tiny_llama.hf["model.layers.0.self_attn.q_proj.weight"][head * 16 + half * 8 + pair]
                assert np.array_equal(stored[head * 16 + 2 * pair + half], row)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_rows_are_dequantised_as_the_gguf_package_does(tiny_llama: TinyGguf, kind: str) -> None:
    encoding = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(1).standard_normal((24, 64), np.float32)
    raw = gguf.quantize(values, encoding)
    tiny_llama.writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=encoding)
    file = GgufFile(tiny_llama.write())
    name, expected = "model.layers.0.mlp.down_proj.weight", gguf.dequantize(raw, encoding)
    assert np.array_equal(file.read(name), expected)
    assert np.array_equal(file.read(name, (slice(5, 9), slice(7, 40))), expected[5:9, 7:40])


def test_the_config_is_what_a_hugging_face_folder_would_say(tiny_gguf: TinyGguf) -> None:
    config = GgufFile(tiny_gguf.write()).hf_config()
    expected = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 40,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    }
    if config["model_type"] == "qwen3_moe":
        expected |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
    assert expected.items() <= config.items()


def test_a_head_of_its_own_is_not_tied(tiny_llama: TinyGguf) -> None:
    tiny_llama.writer.add_tensor("output.weight", np.zeros((40, 32), np.float32))
    file = GgufFile(tiny_llama.write())
    assert file.hf_config()["tie_word_embeddings"] is False
    assert "lm_head.weight" in file.hf_tensors


def test_rope_frequency_divisors_become_longrope_factors(tiny_llama: TinyGguf) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    tiny_llama.writer.add_tensor("rope_freqs.weight", factors)
    file = GgufFile(tiny_llama.write())
    scaling = file.hf_config()["rope_scaling"]
    assert scaling == {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": 128,
    }
    assert not any("rope" in name for name in file.hf_tensors)


def test_yarn_scaling_is_read_and_another_kind_refused(tiny_llama: TinyGguf, tmp_path: Path) -> None:
    writer = tiny_llama.writer
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)
    assert GgufFile(tiny_llama.write()).hf_config()["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    other = TinyGguf(tmp_path / "other.gguf", "llama")
    other.writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    with pytest.raises(UnsupportedModel, match="rope scaling 'longrope' is not known"):
        GgufFile(other.write()).hf_config()


def test_an_architecture_nobody_here_has_is_unsupported_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="architecture bloom; known in GGUF are dense llama, qwen3moe"):
        _ = GgufFile(TinyGguf(tmp_path / "x.gguf", "bloom").write()).hf_tensors
    mixtral = TinyGguf(tmp_path / "y.gguf", "llama")
    mixtral.writer.add_expert_count(8)
    with pytest.raises(UnsupportedModel, match="architecture llama with experts"):
        GgufFile(mixtral.write()).hf_config()


def test_one_part_of_a_split_file_says_to_merge_first(tiny_llama: TinyGguf) -> None:
    tiny_llama.writer.add_uint16("split.count", 3)
    with pytest.raises(CheckpointError, match="one part of a split GGUF; merge"):
        GgufFile(tiny_llama.write())


def test_a_truncated_file_is_named_with_where_it_ends(tiny_llama: TinyGguf) -> None:
    path = tiny_llama.write()
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(CheckpointError, match=r"llama\.gguf is cut short: its tensors end at byte \d+, the file at"):
        open_checkpoint(path)
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"llama\.gguf is not a readable GGUF file"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read"):
        open_checkpoint(path)
    path.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(CheckpointError, match="it begins with b'PK"):
        open_checkpoint(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_in_the_header_either_reads_or_is_one_of_our_errors(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "damaged.gguf"
    if not path.exists():
        TinyGguf(path, "llama").write()
        path.rename(tmp_path / "whole.bin")
    raw = bytearray((tmp_path / "whole.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError, UnsupportedModel), open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            checkpoint.read(name)
        GgufFile(path).hf_config()
