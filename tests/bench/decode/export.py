"""The model as a Hugging Face folder, in the benchmark's dtype, for peers that read nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from afd.build import Plan
from afd.topology import FfnShard
from afd.types import Role

FAMILIES = ("llama", "qwen3_moe")  # those that peers can read as they are
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def export(plan: Plan, folder: Path) -> Path:
    """Writes both halves' weights, the config and the tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for weights in (plan.weights(Role.ATTENTION), plan.weights(Role.FFN, FfnShard(0, 1, 1))):
        tensors |= {name: weights[name].contiguous() for name in list(weights)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(plan.torch_dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(plan.files.config | {"torch_dtype": dtype, "dtype": dtype}))
    home = plan.files.path if plan.files.path.is_dir() else plan.files.path.parent
    for name in TOKENIZER_FILES:
        if (home / name).exists():
            shutil.copy(home / name, folder / name)
    return folder
