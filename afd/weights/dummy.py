"""Random weights in a model's shapes, for tests and benches: as a checkpoint folder or in memory.

Each tensor depends on its name and the seed alone, so every role draws the same numbers without shipping them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from afd.types import TensorSpec


def tensor(spec: TensorSpec, seed: int) -> Tensor:
    """float32 of the spec's shape: norms (one axis) near 1, others with standard deviation 1/sqrt(last axis)."""
    # CPU generators keep 32 bits of a seed, so seed and name have to share them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {spec.name}".encode()))
    values = torch.randn(spec.shape, generator=generator)
    return 1 + 0.1 * values if len(spec.shape) == 1 else values * spec.shape[-1] ** -0.5


def weights(specs: Sequence[TensorSpec], seed: int) -> dict[str, Tensor]:
    """Every tensor that is not optional, whole, by name."""
    return {spec.name: tensor(spec, seed) for spec in specs if not spec.optional}


def write_checkpoint(
    path: Path, config: Mapping[str, object], specs: Sequence[TensorSpec], seed: int, shards: int = 1
) -> Path:
    """A Hugging Face folder at `path` with config.json and float32 safetensors, indexed when `shards` is above 1."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config), indent=1))
    needed = [spec for spec in specs if not spec.optional]
    if shards == 1:
        save_file(weights(needed, seed), path / "model.safetensors")
        return path
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = needed[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(weights(part, seed), path / file)
        weight_map |= {spec.name: file for spec in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
