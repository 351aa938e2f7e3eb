"""The planner's model and precision, from the command line's words."""

from __future__ import annotations

from afd.described import describe
from afd.errors import ConfigError
from afd.planner.models import MODELS, Planned, Precision, find
from afd.types import DType
from afd.weights import library

_PRECISIONS = {
    "fp8": Precision(),
    "bf16": Precision(DType.BF16, DType.BF16),
    "fp8-bf16kv": Precision(DType.FP8, DType.BF16),
    "fp32": Precision(DType.FP32, DType.FP32),
}


def resolve(name_or_path: str) -> Planned:
    """A built-in model, a config.json or its folder; or whatever else `afd serve` takes. Raises ModelError."""
    if name_or_path in MODELS or not (name_or_path.endswith(".gguf") or name_or_path in library.KNOWN):
        return find(name_or_path)
    return Planned(name_or_path, describe(library.resolve(name_or_path).config))


def precision(name: str) -> Precision:
    """Raises ConfigError with the choices."""
    if name not in _PRECISIONS:
        raise ConfigError(f"--dtype is {name!r}; choose one of {', '.join(_PRECISIONS)}")
    return _PRECISIONS[name]
