"""Random small models: as transformers makes them, and as the two halves built from the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from afd.models import registry
from afd.models.halves import FfnHalf
from afd.models.reference import WholeModel
from afd.spec import ModelSpec, from_config
from afd.topology import FfnShard
from afd.types import Role
from afd.weights import ownership

COMMON: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 97,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = COMMON | {"model_type": "llama"}
QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "head_dim": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
STEP3: dict[str, object] = {
    "model_type": "step3_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_attention_groups": 1,
    "head_dim": 24,
    "share_q_dim": 40,
    "intermediate_size": 97,
    "moe_num_experts": 12,
    "moe_top_k": 3,
    "moe_intermediate_size": 20,
    "share_expert_dim": 25,
    "norm_expert_weight": True,
    "moe_layers_enum": "1,2",
    "vocab_size": 131,
    "max_position_embedding": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
}

MODELS: dict[str, dict[str, object]] = {
    "step3": STEP3,
    "step3 without shared expert": STEP3 | {"share_expert_dim": 0},
    "llama": LLAMA,
    "qwen3_moe": QWEN3_MOE | {"mlp_only_layers": [0]},
}


@dataclass(frozen=True)
class Checkpoint:
    """A config.json, the tensors beside it, and transformers' model of both."""

    config: Mapping[str, object]
    weights: Mapping[str, Tensor]
    model: transformers.PreTrainedModel

    @property
    def spec(self) -> ModelSpec:
        return from_config(self.config)

    def expected_logits(self, token_ids: list[int]) -> Tensor:
        """[tokens, vocab] by transformers, in float32."""
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([token_ids])).logits[0]
        return logits


def by_transformers(config: Mapping[str, object], seed: int = 0) -> Checkpoint:
    """A random float32 model. Its weights are in the published layout: each expert in tensors of its own."""
    family = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }[str(config["model_type"])]
    settings = {k: v for k, v in config.items() if k != "model_type"}
    model = family[1](family[0](**settings, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_random(parameter.shape, generator))
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        weights |= _published(name, value)
    return Checkpoint(config, weights, model)


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a spec, for families that transformers does not have."""
    generator = torch.Generator().manual_seed(seed)
    return {t.name: _random(t.shape, generator) for t in registry.family(spec.family).tensors(spec) if not t.optional}


def role_weights(
    spec: ModelSpec, weights: Mapping[str, Tensor], role: Role, shard: FfnShard | None
) -> dict[str, Tensor]:
    """What the loader would hand to one role."""
    owned = ownership.owned(registry.family(spec.family).tensors(spec), role, shard)
    return {t.name: weights[t.name][index] for t, index in owned}


def ffn_half(spec: ModelSpec, weights: Mapping[str, Tensor], shard: FfnShard) -> FfnHalf:
    return registry.family(spec.family).ffn(spec, role_weights(spec, weights, Role.FFN, shard), shard)


def whole_model(spec: ModelSpec, weights: Mapping[str, Tensor]) -> WholeModel:
    attention = registry.family(spec.family).attention(spec, role_weights(spec, weights, Role.ATTENTION, None))
    return WholeModel(spec, attention, ffn_half(spec, weights, FfnShard(0, 1, 1)))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norm weights near 1; matrices that keep the size of what passes through."""
    values = torch.randn(shape, generator=generator)
    return 1 + 0.2 * values if len(shape) == 1 else values * shape[-1] ** -0.5


def _published(name: str, value: Tensor) -> dict[str, Tensor]:
    """transformers 5 holds experts stacked in memory; on disk (its own files too) each has its tensors."""
    layer, _, part = name.partition("mlp.experts.")
    if part == "gate_up_proj":
        halves = zip(("gate", "up"), value.chunk(2, dim=1), strict=True)
        return {f"{layer}mlp.experts.{e}.{x}_proj.weight": w for x, half in halves for e, w in enumerate(half)}
    if part == "down_proj":
        return {f"{layer}mlp.experts.{e}.down_proj.weight": w for e, w in enumerate(value)}
    return {name: value}
