"""GGUF files: their metadata as a Hugging Face config, their tensors under Hugging Face names, in float32.

Knows the architectures in `ARCHITECTURES`; the arithmetic of the quantised types is the `gguf` package's. Imports no
torch.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

from afd.errors import CheckpointError, UnsupportedModel
from afd.weights.gguf_format import GgufTensor, parse

Index = tuple[slice, ...]

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}


@dataclass(frozen=True, slots=True)
class HfTensor:
    """Where a Hugging Face tensor lies: a stored tensor, or one expert of a stack; `rope_heads` heads permuted."""

    stored: GgufTensor
    expert: int | None = None
    rope_heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape if self.expert is None else self.stored.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes if self.expert is None else self.stored.nbytes // self.stored.shape[0]


class GgufFile:
    """An open GGUF file. Raises CheckpointError, naming the file, when it is not a whole GGUF of version 2 or 3."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        try:
            self.metadata, self.tensors, self.header_bytes = parse(self._bytes)
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
        end = max((t.offset + t.nbytes for t in self.tensors.values()), default=0)
        if end > len(self._bytes):
            raise CheckpointError(f"{path} is cut short: its tensors end at byte {end}, the file at {len(self._bytes)}")
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{path} is one part of a split GGUF; merge the parts with `llama-gguf-split --merge` first"
            )

    @property
    def architecture(self) -> str:
        """general.architecture. Raises UnsupportedModel when no family here has it."""
        name = str(self.metadata.get("general.architecture", "missing"))
        if name not in ARCHITECTURES or self.metadata.get("llama.expert_count"):
            extra = " with experts" if name == "llama" else ""
            raise UnsupportedModel(
                f"{self.path} has architecture {name}{extra}; known in GGUF are dense {', '.join(ARCHITECTURES)}"
            )
        return name

    @cached_property
    def hf_tensors(self) -> dict[str, HfTensor]:
        """Every tensor under its Hugging Face name. A name that cannot be translated is kept, for others to refuse."""
        found: dict[str, HfTensor] = {}
        llama = self.architecture == "llama"
        for name, tensor in self.tensors.items():
            layer, part = _split(name)
            if name == _ROPE_FACTORS:
                continue  # hf_config has turned it into rope_scaling
            if part in _EXPERT_NAMES:
                for expert in range(tensor.shape[0]):
                    hf = f"model.layers.{layer}.mlp.experts.{expert}.{_EXPERT_NAMES[part]}.weight"
                    found[hf] = HfTensor(tensor, expert=expert)
            elif part in _LAYER_NAMES:
                heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(part)
                rope_heads = self.integer(heads) if llama and heads and len(tensor.shape) == 2 else 0
                if rope_heads and tensor.shape[0] % (2 * rope_heads):
                    raise CheckpointError(
                        f"{self.path}: the {tensor.shape[0]} rows of {name} are not {rope_heads} heads"
                    )
                found[f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"] = HfTensor(tensor, rope_heads=rope_heads)
            else:
                found[_TOP_NAMES.get(name, name)] = HfTensor(tensor)
        return found

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[np.float32]:
        """One tensor by its Hugging Face name, or the part of it at `index`, dequantised to float32.

        Only the rows asked for are touched. May be a view of the mapped file when the encoding is float32 already.
        """
        tensor = self.hf_tensors[name]
        stored = tensor.stored
        block, block_bytes = GGML_QUANT_SIZES[stored.encoding]
        row_bytes = stored.shape[-1] // block * block_bytes
        raw = np.frombuffer(self._bytes, np.uint8, stored.nbytes, stored.offset).reshape(*stored.shape[:-1], row_bytes)
        if tensor.expert is not None:
            raw = raw[tensor.expert]
        index = index or tuple(slice(0, n) for n in tensor.shape)
        leading, last = index[:-1], index[-1]
        if tensor.rope_heads:
            raw = raw[rope_rows(len(raw), tensor.rope_heads)[leading[0]]]
        else:
            raw = raw[leading]
        if raw.size == 0:
            return np.zeros((*raw.shape[:-1], stored.shape[-1]), np.float32)[..., last]
        try:
            values = dequantize(np.ascontiguousarray(raw), stored.encoding)
        except NotImplementedError as error:
            kind = stored.encoding.name
            raise CheckpointError(f"{self.path}: tensor {name} is {kind}, which gguf cannot dequantise") from error
        full: npt.NDArray[np.float32] = values[..., last]
        return full

    def hf_config(self) -> dict[str, object]:
        """The config.json that a Hugging Face folder of this model would have. Raises UnsupportedModel."""
        name = self.architecture
        heads, hidden = self.integer("attention.head_count"), self.integer("embedding_length")
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} has no tensor token_embd.weight, so it is no language model")
        config: dict[str, object] = {
            "architectures": [ARCHITECTURES[name]],
            "model_type": "qwen3_moe" if name == "qwen3moe" else name,
            "hidden_size": hidden,
            "intermediate_size": self.integer("feed_forward_length"),
            "num_hidden_layers": self.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer("attention.head_count_kv", heads),
            "head_dim": self.integer("attention.key_length", hidden // heads),
            "vocab_size": embedding.shape[0],
            "max_position_embeddings": self.integer("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "torch_dtype": "float32",
        }
        if name == "qwen3moe":
            config |= {
                "num_experts": self.integer("expert_count"),
                "num_experts_per_tok": self.integer("expert_used_count"),
                "moe_intermediate_size": self.integer("expert_feed_forward_length"),
                "norm_topk_prob": True,  # what llama.cpp computes for this architecture
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        return config | self.token_ids()

    def token_ids(self) -> dict[str, object]:
        """The ids that begin, end and pad a text, under their Hugging Face names, as far as the file gives them."""
        keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        ids = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    def integer(self, key: str, default: int | None = None) -> int:
        """Metadata `<architecture>.<key>`, 1 or more. Raises CheckpointError when it is missing and has no default."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: metadata {self.architecture}.{key} is {value!r}, not 1, 2, 3, ...")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Metadata `<architecture>.<key>` as a float. Raises CheckpointError when missing without a default."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)):
            raise CheckpointError(f"{self.path}: metadata {self.architecture}.{key} is {value!r}, not a number")
        return float(value)

    def _rope_scaling(self) -> dict[str, object] | None:
        context = self.integer("context_length")
        if _ROPE_FACTORS in self.tensors:
            # One divisor per frequency: exactly what longrope says, and it needs no guess at how they were made.
            raw = self.tensors[_ROPE_FACTORS]
            factors = np.frombuffer(self._bytes, np.float32, raw.shape[0], raw.offset).tolist()
            return {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": context,
            }
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise UnsupportedModel(f"{self.path}: rope scaling {kind!r} is not known; known are none, linear, yarn")
        scaling: dict[str, object] = {"rope_type": kind, "factor": self.number("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self.integer("rope.scaling.original_context_length")
        return scaling


def rope_rows(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Stored row of each Hugging Face row of a llama q_proj or k_proj [rows, hidden].

    llama.cpp rotates neighbours (2j, 2j+1) where Hugging Face rotates halves (j, j + head_dim/2), and stores the rows
    of each head in that order.
    """
    pairs = np.arange(rows, dtype=np.intp).reshape(heads, rows // heads // 2, 2)
    stored: npt.NDArray[np.intp] = pairs.swapaxes(1, 2).reshape(-1)
    return stored


def _split(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    return (match[1], match[2]) if match else ("", "")
