"""Tool calls and reasoning in text that arrives in pieces: wherever it is cut, the same comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.config import RouterSection
from afd.errors import ConfigError
from router.answers.answer import AnswerParser
from router.answers.reasoning import registry as reasoning
from router.answers.reasoning.base import said_by
from router.answers.tools import registry as formats
from router.answers.tools.base import CallDelta
from router.answers.tools.fields import Tool

TOOLS = [
    Tool.model_validate(
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string"},
                        "days": {"type": "integer"},
                        "place": {"type": ["string", "null"]},
                    },
                },
            },
        }
    )
]
BAR = "\N{FULLWIDTH VERTICAL LINE}"


def step3(*invokes: str) -> str:
    calls = "".join(
        f"<{BAR}tool_call_begin{BAR}>function<{BAR}tool_sep{BAR}>{i}<{BAR}tool_call_end{BAR}>" for i in invokes
    )
    return f"<{BAR}tool_calls_begin{BAR}>{calls}<{BAR}tool_calls_end{BAR}>"


def invoke(name: str, **arguments: str) -> str:
    inside = "".join(f'\n<steptml:parameter name="{k}">{v}</steptml:parameter>' for k, v in arguments.items())
    return f'<steptml:invoke name="{name}">{inside}\n</steptml:invoke>'


def read(parser: AnswerParser, pieces: Sequence[str]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Reasoning, content and calls (name, arguments) of a whole answer."""
    reads = [*map(parser.push, pieces), parser.flush()]
    return (
        "".join(r.reasoning for r in reads),
        "".join(r.content for r in reads),
        joined(c for r in reads for c in r.calls),
    )


def joined(deltas) -> list[tuple[str | None, str]]:
    calls: list[tuple[str | None, str]] = []
    for delta in deltas:
        assert isinstance(delta, CallDelta)
        if delta.name is not None:
            assert delta.index == len(calls), "calls come in order"
            calls.append((delta.name, ""))
        name, arguments = calls[delta.index]
        calls[delta.index] = (name, arguments + delta.arguments)
    return calls


def parser(
    tools: str | None, thinking: str | None = None, prompt: str = "", *, only_first: bool = False
) -> AnswerParser:
    kind = reasoning.find(thinking or "none")
    calls = formats.create(tools).parser(TOOLS) if tools else None
    return AnswerParser(kind.parser(said_by(prompt)) if kind else None, calls, only_first=only_first)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "n": [1, "}"]}}\n</tool_call>'
ARGUMENTS = '{"city": "Paris", "n": [1, "}"]}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("  a < b <tool\n", "  a < b <tool\n", []),
        (CALL, "", [("weather", ARGUMENTS)]),
        (f"Let me see.\n{CALL}\n{CALL}\n", "Let me see.", [("weather", ARGUMENTS)] * 2),
        (f"{CALL}\n\nDone. \n", "Done. \n", [("weather", ARGUMENTS)]),
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name":"f","parameters":{"a":"\\\\"}}</tool_call>', "", [("f", '{"a":"\\\\"}')]),
        # Written in another order, without a closing tag, or with arguments as text: a call all the same.
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>!', "!", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}', "", [("f", "{}")]),
        # No call: it stays what it is.
        ("<tool_call>nonsense</tool_call> so", "<tool_call>nonsense</tool_call>so", []),
        ("<tool_call> is a tag", "<tool_call> is a tag", []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ('<tool_call>{"name": "</tool_call>", "a": {}}', '<tool_call>{"name": "</tool_call>", "a": {}}', []),
        # Cut off in the middle.
        ('<tool_call>{"name": "f", "arguments": {"a": [1, ', "", [("f", '{"a": [1, ')]),
        ('So\n<tool_call>\n{"name": "f", "arg', "So", []),
    ],
)  # fmt: skip
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(parser("hermes"), [text])[1:] == (content, calls)
    assert read(parser("hermes"), list(text)) == read(parser("hermes"), [text])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("a < b", "a < b", []),
        (f"So: {step3(invoke('weather', city='Paris', days='3'))}", "So:", [("weather", {"city": "Paris", "days": 3})]),
        (step3(invoke("weather", city="3"), invoke("weather")), "", [("weather", {"city": "3"}), ("weather", {})]),
        (step3(invoke("weather", city="a <b> c", place="null")), "", [("weather", {"city": "a <b> c", "place": None})]),
        (step3(invoke("other", x="1.5", y="so so")) + "\nend", "end", [("other", {"x": 1.5, "y": "so so"})]),
        (step3("nothing to see"), "", []),
    ],
)
def test_step3(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    _, said, found = read(parser("step3"), [text])
    assert (said, [(name, json.loads(arguments)) for name, arguments in found]) == (content, calls)
    assert read(parser("step3"), list(text)) == read(parser("step3"), [text])


@pytest.mark.parametrize(
    ("kind", "prompt", "text", "thought", "content"),
    [
        ("step3", "", "hm, 1 < 2\n</think>\n\nTwo.", "hm, 1 < 2", "Two."),
        ("step3", "", "<think>\nhm</think>Two.</think>", "hm", "Two.</think>"),
        ("step3", "", "never </thin", "never </thin", ""),
        ("step3", "x<think>\n</think>\n", "Two.</think>", "", "Two.</think>"),
        ("step3", "<think>\n", "a</think>b", "a", "b"),
        ("deepseek_r1", "", "\n<think> hm </think> Two.", "hm", "Two."),
        ("deepseek_r1", "", " Two.</think>", "", " Two.</think>"),
        ("deepseek_r1", "", "<th", "", "<th"),
        ("deepseek_r1", "<think>\n", "hm</think>\nTwo.", "hm", "Two."),
    ],
)
def test_reasoning(kind: str, prompt: str, text: str, thought: str, content: str) -> None:
    assert read(parser(None, kind, prompt), [text])[:2] == (thought, content)
    assert read(parser(None, kind, prompt), list(text))[:2] == (thought, content)


HEAD = '{"name": "f", "arguments": '
PIECES = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", " ", "\n", "x", "{", "}", '"', "\\", HEAD,
    '{"a": "</tool_call>"}', ',"id": 1}', CALL, "<tool", "é",
    step3(), *step3(invoke("weather", city="P")).partition("P"),
    f"<{BAR}tool_calls_begin{BAR}>", f"<{BAR}tool_calls_end{BAR}>", f"<{BAR}tool_call_end{BAR}>",
    '<steptml:invoke name="', '<steptml:parameter name="city">', "</steptml:parameter>", "</steptml:invoke>",
]  # fmt: skip


@given(
    st.sampled_from(["hermes", "step3"]),
    st.sampled_from([None, "step3", "deepseek_r1"]),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.data(),
)
def test_what_comes_out_does_not_depend_on_where_the_text_is_cut(tools, thinking, text, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(parser(tools, thinking), pieces) == read(parser(tools, thinking), [text])
    assert read(parser(tools, thinking), list(text)) == read(parser(tools, thinking), [text])


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_text_without_tags_is_content_as_it_is(text: str) -> None:
    plain = text.replace("<", "(")
    assert read(parser("hermes", "deepseek_r1"), list(plain)) == ("", plain, [])


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)),
)
def test_a_call_that_a_format_writes_is_read_back(arguments: dict[str, object]) -> None:
    text = formats.create("hermes").call_text("weather", arguments)
    ((name, written),) = read(parser("hermes"), [text])[2]
    assert (name, json.loads(written)) == ("weather", arguments)


def test_a_call_in_step3s_format_is_read_back() -> None:
    arguments = {"city": "3", "days": 3, "place": None}
    ((name, written),) = read(parser("step3"), [formats.create("step3").call_text("weather", arguments)])[2]
    assert (name, json.loads(written)) == ("weather", arguments)


def test_without_parallel_calls_the_first_is_the_only_one() -> None:
    assert len(read(parser("hermes", only_first=True), [CALL * 3])[2]) == 1


def test_the_deployment_file_knows_the_same_names() -> None:
    fields = RouterSection.model_fields
    assert get_args(fields["tool_parser"].annotation) == tuple(formats.FORMATS)
    assert get_args(fields["reasoning_parser"].annotation) == ("none", *reasoning.REASONING)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"router.tool_parser is 'x'; known are hermes, step3"):
        formats.create("x")
    with pytest.raises(ConfigError, match=r"router.reasoning_parser is 'x'; known are none, step3, deepseek_r1"):
        reasoning.find("x")
