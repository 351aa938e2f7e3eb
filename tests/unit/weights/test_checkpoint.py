from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from afd.errors import CheckpointError
from afd.types import TensorSpec
from afd.weights import dummy
from afd.weights.checkpoint import open_checkpoint
from afd.weights.headers import INDEX, language_model_names, read_header

CONFIG = {"model_type": "test"}


def rewrite_header(path: Path, change: object) -> None:
    """Lays `change` over the header entries of a safetensors file, keeping its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, entry in change.items():  # type: ignore[attr-defined]
        header[name] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("shards", [1, 3])
def test_every_slice_equals_the_same_slice_of_the_whole(tmp_path: Path, specs: list[TensorSpec], shards: int) -> None:
    folder = dummy.write_checkpoint(tmp_path, CONFIG, specs, seed=1, shards=shards)
    whole = dummy.weights(specs, seed=1)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names().keys() == whole.keys()
        for name, values in whole.items():
            info = checkpoint.names()[name]
            assert (info.shape, info.dtype, info.nbytes) == (tuple(values.shape), "F32", values.nbytes)
            assert torch.equal(checkpoint.read(name), values)
            index = tuple(slice(n // 3, n // 2) for n in values.shape)
            assert torch.equal(checkpoint.read(name, index), values[index])
            empty = (slice(1, 1), *(slice(0, n) for n in values.shape[1:]))
            assert checkpoint.read(name, empty).shape == values[empty].shape
        assert checkpoint.read_names == whole.keys()


def test_a_name_the_checkpoint_lacks_is_an_error_and_not_recorded(tmp_path: Path, specs: list[TensorSpec]) -> None:
    with open_checkpoint(dummy.write_checkpoint(tmp_path, CONFIG, specs, seed=1)) as checkpoint:
        with pytest.raises(CheckpointError, match=r"holds no tensor model\.nothing"):
            checkpoint.read("model.nothing")
        assert not checkpoint.read_names


def test_a_truncated_file_is_named_with_what_it_lacks(tmp_path: Path, specs: list[TensorSpec]) -> None:
    path = dummy.write_checkpoint(tmp_path, CONFIG, specs, seed=1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short"):
        open_checkpoint(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_in_the_header_either_reads_or_is_a_checkpoint_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, path)
    raw = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, int.from_bytes(raw[:8], "little") + 7))
    raw[where] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    with contextlib.suppress(CheckpointError), open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            checkpoint.read(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": {"shape": [5]}}, r"tensor b is F32 \[5\], 20 bytes, but its header gives it 16"),
        ({"b": {"dtype": "F64"}}, r"tensor b is F64 \[4\], 32 bytes"),
        ({"b": {"dtype": "F31"}}, r"tensor b is damaged: KeyError\('F31'\)"),
        ({"b": {"shape": [-4]}}, "tensor b is F32"),
        ({"a": {"data_offsets": [8, 32]}}, "begins at byte 8, where 0 was expected"),
        ({"b": {"data_offsets": [0, 16]}}, "tensor a begins at byte 0, where 16 was expected"),
    ],
)
def test_a_header_that_lies_is_an_error_that_says_how(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, path)
    rewrite_header(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path, specs: list[TensorSpec]) -> None:
    dummy.write_checkpoint(tmp_path, CONFIG, specs, seed=1, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 1 files that are not there: model-00002-of-00003"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]}), "but .* holds it"),
        (lambda m: m.pop("model.norm.weight"), "puts tensor model.norm.weight into no file"),
        (lambda m: m.update({"ghost": m["model.norm.weight"]}), "puts tensor ghost into .*, which does not hold it"),
        (lambda m: m.update({"ghost": "../elsewhere.safetensors"}), "points outside its folder"),
    ],
)
def test_an_index_at_odds_with_its_files_is_an_error(tmp_path: Path, specs: list[TensorSpec], edit, message) -> None:  # type: ignore[no-untyped-def]
    index = dummy.write_checkpoint(tmp_path, CONFIG, specs, seed=1, shards=3) / INDEX
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": ["a"]}', "{}"])
def test_an_index_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        open_checkpoint(tmp_path)


def test_folders_without_one_clear_choice_of_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 .* files and no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_header_longer_than_its_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header is 1152921504606846976 bytes, the file 10"):
        read_header(path)


@pytest.mark.parametrize(
    ("model", "head", "vision"),
    [
        ("model.language_model.", "lm_head.weight", "model.vision_model."),
        ("language_model.model.", "language_model.lm_head.weight", "vision_model."),
        ("model.", "lm_head.weight", "vit_large_projector."),
        ("", "lm_head.weight", "model.visual."),
    ],
)
def test_a_vision_language_checkpoint_shows_its_language_model_and_says_what_it_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, head: str, vision: str
) -> None:
    stored = {
        f"{model}embed_tokens.weight": torch.rand(4, 2),
        f"{model}layers.0.mlp.up_proj.weight": torch.rand(3, 2),
        head: torch.rand(4, 2),
        f"{vision}embed_tokens.weight": torch.rand(2, 2),
        f"{vision}layers.0.mlp.up_proj.weight": torch.rand(2**18),
    }
    save_file(stored, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO), open_checkpoint(tmp_path) as checkpoint:
        plain = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
        assert checkpoint.names().keys() == plain
        assert torch.equal(checkpoint.read("lm_head.weight"), stored[head])
        read = checkpoint.read("model.layers.0.mlp.up_proj.weight", (slice(1, 3), slice(0, 2)))
        assert torch.equal(read, stored[f"{model}layers.0.mlp.up_proj.weight"][1:3])
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'model.safetensors'}: skipped 2 vision tensors (1.0 MiB)"
    ]


def test_names_beside_the_language_model_keep_theirs_so_that_they_count_as_left_over() -> None:
    plain, vision = language_model_names(["model.language_model.embed_tokens.weight", "model.audio.weight"])
    assert plain["model.audio.weight"] == "model.audio.weight"
    assert not vision
