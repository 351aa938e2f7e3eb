"""The tokenizer inside a GGUF file, as the tokenizer.json and tokenizer_config.json of a Hugging Face folder.

Byte-level BPE only (tokenizer.ggml.model "gpt2"). A GGUF names its pre-tokenizer and does not describe it, so each
name in `PRE_TOKENIZERS` stands for what the model's own tokenizer.json has there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from afd.errors import CheckpointError, UnsupportedModel
from afd.weights.gguf import GgufFile


class TokenType(IntEnum):
    """tokenizer.ggml.token_type, of which only these two are more than vocabulary."""

    CONTROL = 3
    USER_DEFINED = 4


# One digit at a time (Qwen 2) and up to three (Llama 3) inside otherwise the same pattern.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> PreTokenizer:
    # Digits come off first, so that "  7" is two spaces and a 7, and " ½" a space and a ½. (transformers' own reading
    # of a GGUF leaves this step out and gives space, space, 7 and a "Ġ½": not the tokens the model was trained on.)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _pattern(digits: str) -> PreTokenizer:
    split = pre_tokenizers.Split(Regex(_SPLIT % digits), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: Mapping[str, Callable[[], PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": _gpt2,
    "qwen2": lambda: _pattern(r"\p{N}"),
    "llama-bpe": lambda: _pattern(r"\p{N}{1,3}"),
}
_NORMALIZERS: Mapping[str, Callable[[], Normalizer]] = {"qwen2": normalizers.NFC}


def build(gguf: GgufFile) -> Tokenizer:
    """The tokenizer. Raises UnsupportedModel for another kind, CheckpointError when its lists are damaged."""
    kind, pre = (str(gguf.metadata.get(f"tokenizer.ggml.{key}", "missing")) for key in ("model", "pre"))
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{gguf.path} has tokenizer {kind}/{pre}; known in GGUF is gpt2 with {', '.join(PRE_TOKENIZERS)}. "
            "A folder with config.json, tokenizer.json and the GGUF works for any"
        )
    tokens, merges = _strings(gguf, "tokens"), _strings(gguf, "merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    model = BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    if pre in _NORMALIZERS:
        tokenizer.normalizer = _NORMALIZERS[pre]()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    types = gguf.metadata.get("tokenizer.ggml.token_type")
    for token, type_ in zip(tokens, types if isinstance(types, list) else [], strict=False):
        if type_ in (TokenType.CONTROL, TokenType.USER_DEFINED):
            control = type_ == TokenType.CONTROL
            (tokenizer.add_special_tokens if control else tokenizer.add_tokens)([AddedToken(token, normalized=False)])
    bos = _token(gguf, tokens, "bos")
    if bos is not None and gguf.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokens.index(bos))]
        )
    return tokenizer


def config(gguf: GgufFile) -> dict[str, object]:
    """tokenizer_config.json: chat template, BOS, EOS, UNK and padding tokens, longest input in tokens."""
    tokens = _strings(gguf, "tokens")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {f"{short}_token": _token(gguf, tokens, long) for short, long in names.items()}
    template = gguf.metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.integer("context_length"),
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in found.items() if token is not None},
        **({"chat_template": template} if template else {}),
    }


def _strings(gguf: GgufFile, key: str) -> list[str]:
    values = gguf.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise CheckpointError(f"{gguf.path}: metadata tokenizer.ggml.{key} is not a list of strings")
    return values


def _token(gguf: GgufFile, tokens: list[str], name: str) -> str | None:
    token_id = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None
