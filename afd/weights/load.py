"""Loads one role's weights: checked first, then streamed tensor by tensor, each in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from afd.errors import ConfigError
from afd.topology import FfnShard
from afd.torch_dtypes import TORCH_DTYPES
from afd.types import DType, Role, TensorSpec
from afd.weights.checkpoint import Checkpoint
from afd.weights.ownership import check, elements, owned

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being loaded


def load(
    checkpoint: Checkpoint,
    specs: Sequence[TensorSpec],
    role: Role,
    shard: FfnShard | None,
    dtype: DType,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """This role's part of every tensor it owns, by checkpoint name, contiguous, in `dtype` on `device`.

    `specs` lists every tensor of the model, all roles' (that is what the checkpoint is checked against); `shard` is
    None for attention. Memory beyond the result: one tensor. Raises CheckpointError when the checkpoint does not hold
    exactly the tensors of `specs`.
    """
    check(specs, checkpoint.names(), str(checkpoint.path))
    mine = owned(specs, role, shard)
    sizes = [dtype.itemsize * elements(index) for _, index in mine]
    weights: dict[str, Tensor] = {}
    done, total = 0, sum(sizes)
    for (spec, index), size in zip(mine, sizes, strict=True):
        part = checkpoint.read(spec.name, index)
        weights[spec.name] = torch.empty(part.shape, dtype=TORCH_DTYPES[dtype], device=device).copy_(part)
        done += size
        if progress is not None:
            progress(done, total, spec.name)
    return weights


def resolve_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """auto is the CUDA device when there is one, else the CPU. Raises ConfigError when CUDA is asked and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here; use device auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(wanted: Literal["auto", "fp32", "bf16"], config: Mapping[str, Any], device: torch.device) -> DType:
    """auto is the dtype the checkpoint's config.json names: fp32 for float32, and for any other bf16 where the device
    computes in it natively, else fp32. So nothing is rounded that was not stored rounded (transformers' "auto")."""
    if wanted != "auto":
        return DType.FP32 if wanted == "fp32" else DType.BF16
    text = config.get("text_config")
    named = [part.get(key) for part in (text, config) if isinstance(part, Mapping) for key in ("dtype", "torch_dtype")]
    if next((name for name in named if name), "bfloat16") == "float32":
        return DType.FP32
    if device.type == "cuda":
        return DType.BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else DType.FP32
    return DType.BF16 if cpu_has_bf16() else DType.FP32


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16, AMX, or Arm's bf16); False where Linux cannot say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = {f for line in lines if line.startswith(("flags", "Features")) for f in line.partition(":")[2].split()}
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
