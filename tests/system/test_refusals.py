"""What cannot be served is refused by `afd serve` with one sentence that names it, and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.system.serving import refused


def corrupt(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def remove_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.wq.weight"]
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.layers.7.surprise": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors")


def change_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (corrupt, "model.safetensors"),
        (truncate, "model.safetensors"),
        (remove_tensor, "model.layers.1.self_attn.wq.weight"),
        (add_tensor, "model.layers.7.surprise"),
        (change_family, "mamba"),
    ],
)
def test_a_damaged_model_is_named(tmp_path: Path, damage: Callable[[Path], None], sentence: str) -> None:
    folder = tiny.write(tmp_path / "model")
    damage(folder)
    code, said = refused("--model", str(folder), "--port", "0", "--transport", "inproc")
    assert code == 2, said
    assert sentence in said
    assert "Traceback" not in said


def test_a_damaged_model_is_named_by_the_process_that_reads_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    truncate(folder)
    code, said = refused("--model", str(folder), "--port", "0", "--backend", "local")
    assert code == 2, said
    assert "model.safetensors" in said
    assert "Traceback" not in said


def test_a_topology_the_experts_do_not_divide_into_says_which_would(tmp_path: Path) -> None:
    code, said = refused("--model", str(tiny.write(tmp_path / "model")), "--port", "0", "--topology", "1A3F")
    assert code == 2, said
    assert "8 experts do not divide over 3 EP groups" in said


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    code, said = refused("--model", "gpt-5", "--port", "0")
    assert code == 2, said
    assert "gpt-5" in said
    assert "smollm2-step3" in said
