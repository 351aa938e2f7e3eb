"""A small random checkpoint that `afd serve` takes: config, weights, a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from afd import spec as specs
from afd.models import registry
from afd.weights import dummy

EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
CONFIG: dict[str, object] = {
    "model_type": "step3_text",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 256,
    "num_attention_heads": 4,
    "head_dim": 32,
    "share_q_dim": 48,
    "num_attention_groups": 1,
    "intermediate_size": 96,
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_intermediate_size": 40,
    "share_expert_dim": 24,
    "norm_expert_weight": True,
    "moe_layers_enum": "1",
    "rope_theta": 10000.0,
    "max_position_embedding": 1024,
}


def write(
    folder: Path, seed: int = 0, *, template: str = CHAT_TEMPLATE, specials: Sequence[str] = (), **changes: object
) -> Path:
    """The checkpoint as a Hugging Face folder. `changes` are to its config; `specials`: see write_tokenizer."""
    config = CONFIG | changes
    spec = specs.from_config(config)
    dummy.write_checkpoint(folder, config, registry.family(spec.family).tensors(spec), seed)
    write_tokenizer(folder, specials)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": EOS}))
    return folder


def write_tokenizer(folder: Path, specials: Sequence[str] = ()) -> Path:
    """tokenizer.json: a token for each byte, EOS, which is 256, and from 257 on `specials`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, *specials])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def byte_ids(data: bytes) -> list[int]:
    """The token of each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + [byte for byte in range(256) if byte not in printable]  # by the characters that stand for them
    return [order.index(byte) for byte in data]
