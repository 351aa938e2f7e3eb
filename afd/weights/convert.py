"""A Llama model (GQA, dense) re-expressed as a Step-3 model (MFA, MoE) that computes the same function.

It gives a real MFA + MoE checkpoint with an independent oracle. In numpy, float32, layer by layer:

- The G key heads of size d become one of G·d: k and v stacked; a query head keeps its d numbers in its group's place,
  zeros elsewhere, times √G because the attention scale is (G·d)^-0.5 and not d^-0.5; o_proj's columns follow.
- Step-3 rotates pairs (i, i + G·d/2). Pair i is given to group i // (d/2) and frequency i % (d/2), so the frequencies
  are not one geometric row; longrope factors θ^((i mod d/2)/(d/2) − i/(G·d/2)) say in config terms what they are.
- input_layernorm's weight goes into k, v and wq and becomes 1; q_proj is the identity, so x arrives at inter_norm
  (weight 1) already normalised and only a second ε is added: about 3e-5 relative in the logits, all else is exact.
- The first `1/shared_part` of an MoE layer's intermediate is the shared expert, the rest one expert copied `experts`
  times behind a random gate: renormalised weights sum to 1, so whatever the gate picks, the sum is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from afd.errors import UnsupportedModel

Array = npt.NDArray[np.float32]
Read = Callable[[str], Array]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The free choices: experts and top_k, dense layers at both ends, the shared expert's part, the gate's seed."""

    experts: int = 8
    top_k: int = 2
    dense_first: int = 4
    dense_last: int = 1
    shared_part: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LlamaToStep3:
    """One conversion: the Llama's sizes, taken from its config.json, and the recipe."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    theta: float
    source: Mapping[str, object]
    recipe: Recipe = Recipe()

    @classmethod
    def from_config(cls, config: Mapping[str, object], recipe: Recipe | None = None) -> LlamaToStep3:
        """Raises UnsupportedModel for a config whose rope is scaled or that has biases: the algebra covers neither."""
        if config.get("model_type") != "llama" or config.get("rope_scaling") or config.get("attention_bias"):
            raise UnsupportedModel(
                "only a llama config without rope_scaling and attention_bias can become a step3_text"
            )
        keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        layers, hidden, heads, kv_heads, head_dim = (int(str(config[key])) for key in keys)
        intermediate, theta = int(str(config["intermediate_size"])), float(str(config["rope_theta"]))
        return cls(layers, hidden, heads, kv_heads, head_dim, intermediate, theta, config, recipe or Recipe())

    @property
    def wide(self) -> int:
        """Size of the one head that holds every group."""
        return self.kv_heads * self.head_dim

    @property
    def shared(self) -> int:
        """Intermediate size of the shared expert."""
        return self.intermediate // self.recipe.shared_part

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that get experts."""
        return range(self.recipe.dense_first, self.layers - self.recipe.dense_last)

    def config(self) -> dict[str, object]:
        """config.json of the Step-3 model, rope type longrope with its factors spelled out."""
        half, pairs = self.head_dim // 2, self.wide // 2
        factors = [self.theta ** ((i % half) / half - i / pairs) for i in range(pairs)]
        context = self.source["max_position_embeddings"]
        kept = (
            "vocab_size",
            "rms_norm_eps",
            "hidden_act",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
        return {
            "architectures": ["Step3TextForCausalLM"],
            "model_type": "step3_text",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_attention_groups": 1,
            "head_dim": self.wide,
            "share_q_dim": self.hidden,
            "moe_num_experts": self.recipe.experts,
            "moe_top_k": self.recipe.top_k,
            "moe_intermediate_size": self.intermediate - self.shared,
            "share_expert_dim": self.shared,
            "norm_expert_weight": True,
            "moe_layers_enum": ",".join(map(str, self.moe_layers)),
            "max_position_embedding": context,
            "rope_theta": self.theta,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": context,
            },
            "torch_dtype": "float32",
            **{key: self.source[key] for key in kept if key in self.source},
        }

    def top(self, read: Read) -> dict[str, Array]:
        """Embedding, final norm and, unless tied, the LM head: unchanged."""
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        if not self.source.get("tie_word_embeddings"):
            names.append("lm_head.weight")
        return {name: read(name) for name in names}

    def layer(self, layer: int, read: Read) -> dict[str, Array]:
        """Every tensor of one Step-3 layer, from the Llama's tensors that `read` gives by name."""
        prefix = f"model.layers.{layer}."

        def old(name: str) -> Array:
            return read(f"{prefix}{name}.weight")

        new = self._attention(old) | (self._moe(layer, old) if layer in self.moe_layers else self._dense(old))
        return {f"{prefix}{name}.weight": np.ascontiguousarray(values, np.float32) for name, values in new.items()}

    def _attention(self, old: Read) -> dict[str, Array]:
        half = self.head_dim // 2
        norm = old("input_layernorm")  # [hidden], a factor on the columns of whatever reads x
        query = (old("self_attn.q_proj") * norm).reshape(self.heads, 2, half, self.hidden)
        key = (old("self_attn.k_proj") * norm).reshape(self.kv_heads, 2, half, self.hidden)
        output = old("self_attn.o_proj").reshape(self.hidden, self.heads, self.head_dim)
        wide_query = np.zeros((self.heads, 2, self.kv_heads, half, self.hidden), np.float32)
        wide_output = np.zeros((self.hidden, self.heads, self.kv_heads, self.head_dim), np.float32)
        for head in range(self.heads):
            group = head * self.kv_heads // self.heads
            wide_query[head, :, group] = query[head] * np.float32(math.sqrt(self.kv_heads))
            wide_output[:, head, group] = output[:, head]
        return {
            "input_layernorm": np.ones(self.hidden, np.float32),
            "post_attention_layernorm": old("post_attention_layernorm"),
            "self_attn.q_proj": np.eye(self.hidden, dtype=np.float32),
            "self_attn.inter_norm": np.ones(self.hidden, np.float32),
            "self_attn.wq": wide_query.reshape(self.heads * self.wide, self.hidden),
            "self_attn.k_proj": key.swapaxes(0, 1).reshape(self.wide, self.hidden),
            "self_attn.v_proj": old("self_attn.v_proj") * norm,
            "self_attn.o_proj": wide_output.reshape(self.hidden, self.heads * self.wide),
        }

    def _dense(self, old: Read) -> dict[str, Array]:
        return {name: old(name) for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}

    def _moe(self, layer: int, old: Read) -> dict[str, Array]:
        gate, up, down = (old(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
        rng = np.random.default_rng((self.recipe.seed, layer))
        copies = (self.recipe.experts, 1, 1)
        return {
            "moe.gate": rng.standard_normal((self.recipe.experts, self.hidden), np.float32) * self.hidden**-0.5,
            "moe.gate_proj": np.tile(gate[self.shared :], copies),
            "moe.up_proj": np.tile(up[self.shared :], copies),
            "moe.down_proj": np.tile(down[:, self.shared :], copies),
            "share_expert.gate_proj": gate[: self.shared],
            "share_expert.up_proj": up[: self.shared],
            "share_expert.down_proj": down[:, : self.shared],
        }

    def total_bytes(self) -> int:
        """Bytes that all tensors take together in float32."""
        attention = self.hidden * (3 + self.hidden + 2 * self.wide + 2 * self.heads * self.wide)
        dense = 3 * self.hidden * self.intermediate
        experts = 3 * self.hidden * (self.intermediate - self.shared) * (self.recipe.experts - 1)
        moe = experts + self.recipe.experts * self.hidden
        vocab = int(str(self.source["vocab_size"])) * (1 if self.source.get("tie_word_embeddings") else 2)
        top = self.hidden * (vocab + 1)
        return 4 * (top + self.layers * (attention + dense) + len(self.moe_layers) * moe)
