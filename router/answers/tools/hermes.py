"""Hermes' format, which Qwen and many others share: <tool_call>{"name": …, "arguments": {…}}</tool_call>."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from router.answers.tools.base import CallDelta, CallGrammar, CallParser, Json, Parsed, ToolFormat, compact, quoted
from router.answers.tools.fields import Function, Tool
from router.text.json_scan import ObjectEnd
from router.text.tags import UpToTag

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# A call as it is usually written, up to its arguments, which can then be passed on as they come.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)


class HermesParser(CallParser):
    """See CallParser. One state is one method that takes text, and says what of it belongs to a later state."""

    def __init__(self) -> None:
        self._calls = 0
        self._state: Callable[[Parsed, str], str] = self._content
        self._text = UpToTag([_OPEN])
        self._body = ""  # of a call whose head or end has not come
        self._arguments = ObjectEnd()

    def push(self, text: str) -> Parsed:
        parsed = Parsed()
        while text:
            text = self._state(parsed, text)
        return parsed

    def flush(self, *, forced: bool = False) -> Parsed:
        parsed = Parsed()
        if self._state == self._content:
            parsed.content = self._text.flush(tag_expected=forced or self._calls > 0)
        elif self._state == self._head:
            begun = self._body.strip()[:1] in ("", "{")  # the head of a call, cut off, is not for anybody to read
            self._whole_call(parsed, self._body, "" if begun else f"{_OPEN}{self._body}")
        return parsed

    def _content(self, parsed: Parsed, text: str) -> str:
        certain, tag, rest = self._text.push(text)
        parsed.content += certain
        if tag is not None:
            self._state, self._body = self._head, ""
        return rest

    def _head(self, parsed: Parsed, text: str) -> str:
        """A call that begins as usual goes on in `_streamed`; any other is judged when it is whole."""
        self._body += text
        end = self._body.find(_CLOSE)
        head = _HEAD.match(self._body, 0, end if end >= 0 else len(self._body))
        name = _loads(head[1]) if head else None
        if head and isinstance(name, str):
            parsed.calls.append(CallDelta(self._calls, name))
            self._state, self._arguments = self._streamed, ObjectEnd()
            return self._body[head.end() :]
        if end < 0:
            return ""
        body, rest = self._body[:end], self._body[end + len(_CLOSE) :]
        self._whole_call(parsed, body, f"{_OPEN}{body}{_CLOSE}")
        self._state = self._between
        return rest

    def _streamed(self, parsed: Parsed, text: str) -> str:
        end = self._arguments.push(text)
        parsed.calls.append(CallDelta(self._calls, None, text[:end]))
        if end is None:
            return ""
        self._calls += 1
        self._state, self._body = self._tail, ""
        return text[end:]

    def _tail(self, _parsed: Parsed, text: str) -> str:
        """What stands between the arguments and the closing tag says nothing."""
        self._body += text
        end = self._body.find(_CLOSE)
        if end < 0:
            return ""
        self._state = self._between
        return self._body[end + len(_CLOSE) :]

    def _between(self, _parsed: Parsed, text: str) -> str:
        rest = text.lstrip()
        if rest:
            self._state, self._text = self._content, UpToTag([_OPEN])
        return rest

    def _whole_call(self, parsed: Parsed, body: str, raw: str) -> None:
        call = _loads(body)
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if isinstance(name, str) and isinstance(arguments, dict):
            parsed.calls.append(CallDelta(self._calls, name, compact(arguments)))
            self._calls += 1
        else:
            parsed.content += raw


def _loads(text: str) -> object:
    """None for what is not JSON."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class Hermes(ToolFormat):
    """See the module."""

    name = "hermes"
    tags = (_OPEN, _CLOSE)

    def parser(self, tools: Sequence[Tool]) -> CallParser:  # noqa: ARG002
        return HermesParser()

    def grammar(self, functions: Sequence[Function], most: int, tag: Callable[[str], str]) -> CallGrammar:
        calls, grammars, params = [], {}, {}
        for i, function in enumerate(functions):
            head = quoted(f'{{"name": {compact(function.name)}, "arguments": ')
            calls.append(f'{head} @arguments_{i} "}}"')
            grammars[f"arguments_{i}"] = {"json_schema": function.schema_of_arguments}
            params[f"arguments_{i}"] = f"tools: the parameters of {function.name}"
        more = f'("\\n" call){{0,{most - 1}}}' if most > 1 else ""
        rules = (
            f"calls: call {more}\n"
            f'call: {tag(_OPEN)} "\\n" ({" | ".join(calls)}) "\\n" {tag(_CLOSE)}\n'
        )  # fmt: skip
        return CallGrammar(rules, grammars, params)

    def describe(self, tools: Sequence[Tool]) -> str:
        listed = "\n".join(compact(tool.for_model()) for tool in tools)
        return (
            "These functions can be called, each described by JSON on its own line:\n"
            f"<tools>\n{listed}\n</tools>\n"
            "To call one, write its name and its arguments as JSON between tags, like this:\n"
            f'{_OPEN}\n{{"name": "the function\'s name", "arguments": {{"an argument": "its value"}}}}\n{_CLOSE}\n'
            "Several calls stand one after another, each in tags of its own."
        )

    def call_text(self, name: str, arguments: Json) -> str:
        return f"{_OPEN}\n{compact({'name': name, 'arguments': arguments})}\n{_CLOSE}"

    def result_text(self, content: str) -> str:
        return f"<tool_response>\n{content}\n</tool_response>"
