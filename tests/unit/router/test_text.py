"""Stop strings, detokenising, token bytes and chat templates: properties over random texts and cuts."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import CHAT_TEMPLATE
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from afd.errors import CheckpointError, RequestError
from router.text.chat import ChatTemplate
from router.text.detokenizer import ByteDetokenizer, WindowDetokenizer, detokenizer
from router.text.stops import StopStrings
from router.text.tokenizer import Tokenizer, off_loop


def pieces_of(text, cuts):
    """`text` cut at the given places."""
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def run_stops(stops, pieces):
    matcher, out = StopStrings(stops), []
    for piece in pieces:
        certain, stop = matcher.push(piece)
        out.append(certain)
        if stop is not None:
            return "".join(out), stop
    return "".join(out) + matcher.flush(), None


@given(
    text=st.text("ab", max_size=24),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 100), max_size=8),
)
def test_a_stop_string_is_found_wherever_the_pieces_are_cut(text, stops, cuts):
    ends = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    expected = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
    assert run_stops(stops, pieces_of(text, cuts)) == expected


def test_a_stop_string_that_is_kept_comes_out_whole():
    matcher = StopStrings(["</end>"], keep=True)
    assert matcher.push("hello </e") == ("hello ", None)
    assert matcher.push("nd> more") == ("</end>", "</end>")


def test_only_text_that_may_begin_a_stop_string_is_held_back():
    matcher = StopStrings(["</end>"])
    assert matcher.push("hello <") == ("hello ", None)
    assert matcher.push("/en") == ("", None)
    assert matcher.push("x") == ("</enx", None)
    assert matcher.push("<") == ("", None)
    assert matcher.flush() == "<"


def detokenize(tokenizer, prompt, answer, kind=detokenizer, special=False):
    follower = kind(tokenizer, prompt, special=special)
    return [*map(follower.push, answer), follower.flush()]


@given(text=st.text(max_size=40))
def test_pieces_of_an_answer_join_to_its_text_and_never_show_half_a_character(tokenizer, text):
    prompt, answer = tokenizer.encode("the", special=False), tokenizer.encode(text, special=False)
    pieces = detokenize(tokenizer, prompt, answer)
    assert "".join(pieces) == tokenizer.decode(answer)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(answer=st.lists(st.integers(0, 299), max_size=12))
def test_pieces_of_any_tokens_join_to_what_decoding_them_at_once_gives(tokenizer, answer):
    assert "".join(detokenize(tokenizer, tokenizer.encode("the", special=False), answer)) == tokenizer.decode(answer)


@given(answer=st.lists(st.integers(0, 310), max_size=16), special=st.booleans())
def test_following_bytes_gives_what_following_a_window_gives(tokenizer, answer, special):
    prompt = tokenizer.encode("the", special=False)
    by_bytes = detokenize(tokenizer, prompt, answer, ByteDetokenizer, special)
    assert "".join(by_bytes) == "".join(detokenize(tokenizer, prompt, answer, WindowDetokenizer, special))
    assert "".join(by_bytes) == tokenizer.decode(answer, special=special)


def test_only_tokenizers_that_join_bytes_are_followed_by_their_bytes(tokenizer, sentencepiece):
    assert isinstance(detokenizer(tokenizer, []), ByteDetokenizer)
    assert isinstance(detokenizer(sentencepiece, []), WindowDetokenizer)


def test_a_character_begun_in_the_prompt_is_finished_in_the_answer(tokenizer):
    ids = tokenizer.encode("日", special=False)
    assert "".join(detokenize(tokenizer, ids[:-1], ids[-1:])) == "日"


def test_bytes_that_never_become_a_character_do_not_hold_the_answer_back_for_ever(tokenizer):
    half = tokenizer.encode("日", special=False)[0]
    pieces = detokenize(tokenizer, [], [half] * 100)
    assert sum(map(bool, pieces)) > 3


def test_special_tokens_are_not_text(tokenizer):
    ids = tokenizer.encode("a<|im_end|>b", special=False)
    assert len(ids) == 3
    assert "".join(detokenize(tokenizer, [], ids)) == "ab"


@pytest.fixture
def sentencepiece(tmp_path):
    """A Llama-2 style tokenizer: words begin with U+2581, unknown bytes are tokens like <0xE6>."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi"]
    merges = [("▁", "h"), ("▁h", "i")]
    library = Library(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    file = tmp_path / "tokenizer.json"
    library.save(str(file))
    return Tokenizer(file)


def test_words_keep_their_space_and_byte_tokens_join_to_characters(sentencepiece):
    prompt, whole = sentencepiece.encode("hi", special=False), sentencepiece.encode("hi hi 日日 hi", special=False)
    pieces = detokenize(sentencepiece, prompt, whole[len(prompt) :])
    assert "".join(pieces) == " hi 日日 hi"
    assert not any("\ufffd" in piece for piece in pieces)


def test_token_bytes_of_both_kinds_of_tokenizer_join_to_the_text(tokenizer, sentencepiece):
    for each, lead in ((tokenizer, ""), (sentencepiece, " ")):
        ids = each.encode("hi 日 hi", special=False)
        assert b"".join(map(each.token_bytes, ids)).decode() == f"{lead}hi 日 hi"
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    assert tokenizer.token_bytes(100_000) == b""


def test_a_damaged_tokenizer_names_its_file(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(file)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(file)


def test_long_texts_are_encoded_on_another_thread():
    async def threads():
        return await off_loop(threading.get_ident, 10), await off_loop(threading.get_ident, 10_000_000)

    short, long = asyncio.run(threads())
    assert short == threading.get_ident() != long


def render(template, messages=({"role": "user", "content": "hi"},), **config):
    return ChatTemplate({"chat_template": template, **config}).render(messages)


def test_a_template_is_rendered_with_the_models_special_tokens_and_an_open_assistant_turn():
    assert render(CHAT_TEMPLATE) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render("{{ bos_token }}{{ eos_token }}", bos_token="<s>", eos_token="</s>") == "<s></s>"


def test_templates_may_use_what_hugging_face_gives_them():
    assert render("{% for m in messages %}\n    {{ m.content }}\n{% endfor %}\n") == "    hi\n"
    assert render("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("{{ messages | tojson }}", [{"a": "<é>"}]) == '[{"a": "<é>"}]'
    assert render("{% generation %}words{% endgeneration %}") == "words"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_a_request_may_set_the_variables_of_the_template_but_not_the_messages():
    template = ChatTemplate({"chat_template": "{{ messages[0].content }} {{ mood }} {{ add_generation_prompt }}"})
    messages = [{"content": "hi"}]
    assert template.render(messages) == "hi  True"
    assert template.render(messages, add_generation_prompt=False) == "hi  False"
    assert template.render(messages, variables={"mood": "glad", "messages": [], "self": 1}) == "hi glad True"


def test_a_template_that_is_no_text_stops_the_start():
    with pytest.raises(CheckpointError, match="chat_template in tokenizer_config is a list"):
        render([])


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(RequestError, match="unsafe"):
        render("{{ messages.__class__.__mro__ }}")


def test_a_template_that_is_not_jinja_stops_the_start():
    with pytest.raises(CheckpointError, match="line 2"):
        render("\n{% endfor %}")
