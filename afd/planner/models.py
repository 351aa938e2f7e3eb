"""The Step-3 report's models by name, and the precision that its figures are in (arXiv 2507.19427, section 4.1).

Sizes are those of the models' public cards. A name beside a precision rather than in the model: how many bytes a number
takes is the deployment's choice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from afd.attention_spec import AttentionSpec, HybridSpec
from afd.described import describe
from afd.errors import ModelError
from afd.model_spec import ModelSpec, MoeSpec
from afd.rope_spec import RopeSpec
from afd.types import DType


@dataclass(frozen=True, slots=True)
class Precision:
    """Of weights and products, of the KV cache, and of chunked layers' cache where it is another; a linear layer's
    state is fp32. The report takes 8 bits for everything but the KV cache of hybrids' full layers."""

    weights: DType = DType.FP8
    kv: DType = DType.FP8
    window: DType | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A model as it is planned for."""

    name: str
    spec: ModelSpec
    precision: Precision = Precision()

    def kv_bytes(self, context: float) -> float:
        """Read by one decoded token."""
        return self.spec.kv_bytes(context, self.precision.kv, self.precision.window)

    @property
    def sparsity(self) -> float:
        """Active over all experts, shared ones counted with the active (section 5.3: 8 of 256 and one shared are
        9/256); 1 for a dense model."""
        moe = self.spec.moe
        return 1.0 if moe is None else (moe.top_k + moe.shared_intermediate / moe.intermediate) / moe.experts


def _spec(
    family: str,
    layers: int,
    hidden: int,
    vocab: int,
    attention: AttentionSpec,
    dense_width: int,
    moe: MoeSpec | None,
    hybrid: HybridSpec | None = None,
) -> ModelSpec:
    rope = RopeSpec(attention.head_dim, 10_000.0)  # costs nothing
    return ModelSpec(
        family, layers, hidden, vocab, 1 << 20, 1e-6, False, attention, rope, dense_width, moe, hybrid=hybrid
    )


def _moe(layers: range, experts: int, top_k: int, width: int, shared: int = 0) -> MoeSpec:
    return MoeSpec(tuple(layers), experts, top_k, width, shared, True)


def _mla(heads: int) -> AttentionSpec:
    return AttentionSpec("mla", heads, 1, 128, q_rank=1536, kv_rank=512, rope_dim=64, v_dim=128)


def _gqa(heads: int, kv_heads: int) -> AttentionSpec:
    return AttentionSpec("gqa", heads, kv_heads, 128)


_STEP3 = AttentionSpec("mfa", 64, 1, 256, q_rank=2048)
_SPARSELY_FULL = Precision(kv=DType.BF16, window=DType.FP8)  # hybrids keep their full layers in BF16

MODELS = {
    model.name: model
    for model in (
        Planned("step3", _spec("step3", 61, 7168, 128815, _STEP3, 18432, _moe(range(4, 60), 48, 3, 5120, 5120))),
        # Section 7.3: twice the experts, as many of them active.
        Planned(
            "step3-600b-upcycled",
            _spec("step3", 61, 7168, 128815, _STEP3, 18432, _moe(range(4, 60), 96, 3, 5120, 5120)),
        ),
        Planned(
            "deepseek-v3",
            _spec("deepseek", 61, 7168, 129280, _mla(128), 18432, _moe(range(3, 61), 256, 8, 2048, 2048)),
        ),
        Planned(
            "kimi-k2", _spec("deepseek", 61, 7168, 163840, _mla(64), 18432, _moe(range(1, 61), 384, 8, 2048, 2048))
        ),
        Planned("qwen3-235b", _spec("qwen3_moe", 94, 4096, 151936, _gqa(64, 4), 0, _moe(range(94), 128, 8, 1536))),
        Planned("qwen3-32b", _spec("qwen3", 64, 5120, 151936, _gqa(64, 8), 25600, None)),
        Planned(
            "llama4-maverick",
            _spec(
                "llama4",
                48,
                5120,
                202048,
                _gqa(40, 8),
                16384,
                _moe(range(1, 48, 2), 128, 1, 8192, 8192),
                HybridSpec("chunked", tuple(i for i in range(48) if i % 4 != 3), 8192),
            ),
            _SPARSELY_FULL,
        ),
        Planned(
            "minimax-m1",
            _spec(
                "minimax",
                80,
                6144,
                200064,
                _gqa(64, 8),
                0,
                _moe(range(80), 32, 2, 9216),
                HybridSpec("linear", tuple(i for i in range(80) if i % 8 != 7)),
            ),
            _SPARSELY_FULL,
        ),
        Planned("ernie-4.5", _spec("ernie", 54, 8192, 103424, _gqa(64, 8), 28672, _moe(range(3, 54), 64, 8, 3584))),
        Planned("pangu-pro", _spec("pangu", 48, 5120, 153376, _gqa(40, 8), 0, _moe(range(48), 64, 8, 1344, 4 * 1344))),
    )
}


def find(name_or_path: str) -> Planned:
    """A built-in model, or one described by a config.json: that file, or the folder or .gguf that it belongs to; in
    8 bits. Raises ModelError with the choices for anything else."""
    if name_or_path in MODELS:
        return MODELS[name_or_path]
    path = Path(name_or_path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        try:
            config = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is not readable JSON: {error}") from error
        if not isinstance(config, dict):
            raise ModelError(f"{file} holds a {type(config).__name__}, not an object")
        return Planned(name_or_path, describe(config))
    raise ModelError(
        f"unknown model {name_or_path!r}; known to the planner are {', '.join(MODELS)}, and a config.json or its "
        "folder can be given by its path"
    )
