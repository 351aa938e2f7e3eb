"""The only list of model families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from afd.errors import UnsupportedModel
from afd.models import llama, qwen3_moe, step3
from afd.models.halves import AttentionHalf, FfnHalf
from afd.spec import ModelSpec
from afd.types import TensorSpec


@dataclass(frozen=True)
class Family:
    """One family: its name in ModelSpec.family, its checkpoint's tensors, and its two halves."""

    name: str
    tensors: Callable[[ModelSpec], list[TensorSpec]]
    attention: type[AttentionHalf]
    ffn: type[FfnHalf]


FAMILIES = {
    family.name: family
    for family in (
        Family("step3", step3.tensors, step3.Step3AttentionHalf, step3.Step3FfnHalf),
        Family("llama", llama.tensors, llama.LlamaAttentionHalf, llama.LlamaFfnHalf),
        Family("qwen3_moe", qwen3_moe.tensors, qwen3_moe.Qwen3MoeAttentionHalf, qwen3_moe.Qwen3MoeFfnHalf),
    )
}


def family(name: str) -> Family:
    """The family called `name`; raises UnsupportedModel with the choices for an unknown one."""
    if name not in FAMILIES:
        raise UnsupportedModel(f"model family {name!r} does not exist; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
