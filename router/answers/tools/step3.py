"""Step-3's format, XML between special tokens, one element for each argument:

<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="f"><steptml:parameter name="a">1
</steptml:parameter></steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>

An argument whose schema says "string" is plain text, any other JSON. Forced calls have strings without "<", and keep of
their schemas enum, const, minLength and maxLength; functions that cannot be called in this format are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from afd.errors import RequestError
from router.answers.tools.base import CallDelta, CallGrammar, CallParser, Json, Parsed, ToolFormat, compact, quoted
from router.answers.tools.fields import Function, Tool
from router.text.tags import UpToTag

_BAR = "\N{FULLWIDTH VERTICAL LINE}"
_CALLS, _CALLS_END = f"<{_BAR}tool_calls_begin{_BAR}>", f"<{_BAR}tool_calls_end{_BAR}>"
_CALL, _SEP, _CALL_END = f"<{_BAR}tool_call_begin{_BAR}>", f"<{_BAR}tool_sep{_BAR}>", f"<{_BAR}tool_call_end{_BAR}>"
_PARAMETER_END, _INVOKE_END = "</steptml:parameter>", "</steptml:invoke>"

# No alternative can reach over another, so the first one found is the first one there is, however the text arrives.
_IN_BLOCK = re.compile(rf'<steptml:invoke name="([^"<]*)">|{_CALLS_END}')
_IN_CALL = re.compile(rf'<steptml:parameter name="([^"<]*)">|{_INVOKE_END}|{_CALL_END}|{_CALLS_END}')


class Step3Parser(CallParser):
    """See CallParser. Arguments come out one at a time, each when it is whole."""

    def __init__(self, schemas: Mapping[str, Json]) -> None:
        self._schemas = schemas  # of each function's arguments, by its name
        self._state: Callable[[Parsed, str], str] = self._content
        self._text = UpToTag([_CALLS])
        self._buffer = ""
        self._calls = 0
        self._function = self._argument = ""
        self._seen: set[str] = set()  # arguments of the call

    def push(self, text: str) -> Parsed:
        parsed = Parsed()
        while text:
            text = self._state(parsed, text)
        return parsed

    def flush(self, *, forced: bool = False) -> Parsed:
        expected = forced or self._calls > 0
        return Parsed(self._text.flush(tag_expected=expected) if self._state == self._content else "")

    def _content(self, parsed: Parsed, text: str) -> str:
        certain, tag, rest = self._text.push(text)
        parsed.content += certain
        if tag is not None:
            self._state = self._block
        return rest

    def _block(self, parsed: Parsed, text: str) -> str:
        found, rest = self._find(_IN_BLOCK, text)
        if found is None:
            return ""
        if found[0] == _CALLS_END:
            self._state = self._after
            return rest
        self._function, self._seen, self._state = found[1], set(), self._call
        parsed.calls.append(CallDelta(self._calls, found[1]))
        return rest

    def _call(self, parsed: Parsed, text: str) -> str:
        found, rest = self._find(_IN_CALL, text)
        if found is None:
            return ""
        if found[1] is not None:
            self._argument, self._state = found[1], self._value
            return rest
        parsed.calls.append(CallDelta(self._calls, None, "}" if self._seen else "{}"))
        self._calls += 1
        self._state = self._after if found[0] == _CALLS_END else self._block
        return rest

    def _value(self, parsed: Parsed, text: str) -> str:
        self._buffer += text
        end = self._buffer.find(_PARAMETER_END)
        if end < 0:
            return ""
        value, rest = self._buffer[:end], self._buffer[end + len(_PARAMETER_END) :]
        self._buffer, self._state = "", self._call
        if self._argument not in self._seen:
            key, written = compact(self._argument), compact(self._read(value))
            parsed.calls.append(CallDelta(self._calls, None, f"{', ' if self._seen else '{'}{key}: {written}"))
            self._seen.add(self._argument)
        return rest

    def _after(self, _parsed: Parsed, text: str) -> str:
        rest = text.lstrip()
        if rest:
            self._state, self._text = self._content, UpToTag([_CALLS])
        return rest

    def _find(self, pattern: re.Pattern[str], text: str) -> tuple[re.Match[str] | None, str]:
        """What comes first, and the text behind it; until it comes, the text is kept."""
        buffer = self._buffer + text
        found = pattern.search(buffer)
        self._buffer = "" if found else buffer
        return found, buffer[found.end() :] if found else ""

    def _read(self, text: str) -> object:
        if _is_text(_properties(self._schemas.get(self._function, {})).get(self._argument)):
            return text
        try:
            return json.loads(text, parse_constant=lambda _: text)
        except (ValueError, RecursionError):
            return text.strip()


class Step3(ToolFormat):
    """See the module."""

    name = "step3"
    tags = (_CALLS, _CALL, _SEP, _CALL_END, _CALLS_END)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        return Step3Parser({tool.function.name: tool.function.schema_of_arguments for tool in tools})

    def grammar(self, functions: Sequence[Function], most: int, tag: Callable[[str], str]) -> CallGrammar:
        rules, grammars, params = [], dict[str, Json](), dict[str, str]()
        for i, function in enumerate(functions):
            _check(function)
            schema, parts = function.schema_of_arguments, [quoted(f'<steptml:invoke name="{function.name}">')]
            required = schema.get("required")
            for j, (name, value) in enumerate(_properties(schema).items()):
                inside = _text_rule(value)
                if inside is None:
                    inside, key = f"@argument_{i}_{j}", f"argument_{i}_{j}"
                    grammars[key] = {"json_schema": _with_definitions(value, schema)}
                    params[key] = f"tools: the parameters of {function.name}"
                head = quoted(f'<steptml:parameter name="{name}">')
                part = f"({head} {inside} {quoted(_PARAMETER_END)})"
                parts.append(part if isinstance(required, list) and name in required else f"{part}?")
            rules.append(" ".join([*parts, quoted(_INVOKE_END)]))
        call = f'{tag(_CALL)} "function" {tag(_SEP)} ({" | ".join(rules)}) {tag(_CALL_END)}'
        return CallGrammar(f"calls: {tag(_CALLS)} call{{1,{most}}} {tag(_CALLS_END)}\ncall: {call}\n", grammars, params)

    def describe(self, tools: Sequence[Tool]) -> str:
        listed = "\n".join(compact(tool.for_model()) for tool in tools)
        example = self.call_text("the function's name", {"an argument": "its value"})
        return f"These functions can be called, each described by JSON:\n{listed}\nA call is written so:\n{example}"

    def call_text(self, name: str, arguments: Json) -> str:
        written = "".join(
            f'<steptml:parameter name="{key}">{value if isinstance(value, str) else compact(value)}{_PARAMETER_END}'
            for key, value in arguments.items()
        )
        invoke = f'<steptml:invoke name="{name}">{written}{_INVOKE_END}'
        return f"{_CALLS}{_CALL}function{_SEP}{invoke}{_CALL_END}{_CALLS_END}"

    def result_text(self, content: str) -> str:
        return f"<tool_response>\n{content}\n</tool_response>"


def _properties(schema: Json) -> Mapping[str, object]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _check(function: Function) -> None:
    """Raises RequestError for a function whose forced calls this format would garble."""
    schema = function.schema_of_arguments
    properties, required = _properties(schema), schema.get("required")
    problems = [
        *(
            f'the parameter {name!r}, and a name in it cannot have " or <'
            for name in properties
            if set(name) & set('"<')
        ),
        *(
            f"the parameter {name!r} whose schema has {_PARAMETER_END}, which ends every argument in it"
            for name, value in properties.items()
            if _PARAMETER_END in compact(value)
        ),
        *(
            f"the required parameter {name!r}, which is not among its properties"
            for name in (required if isinstance(required, list) else ())
            if name not in properties
        ),
    ]
    if problems:
        raise RequestError(
            f"tools: the function {function.name} cannot be forced in the format step3: it has {problems[0]}",
            param="tools",
        )


def _is_text(schema: object) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string"


def _text_rule(schema: object) -> str | None:
    """The Lark for a string's value, as plain text; None for a value that is JSON."""
    if not isinstance(schema, dict) or not _is_text(schema):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return f"({' | '.join(map(quoted, values))})"
    least, most = (schema.get(key) if isinstance(schema.get(key), int) else "" for key in ("minLength", "maxLength"))
    return "/[^<]*/" if least == most == "" else f"/[^<]{{{least or 0},{most}}}/"


def _with_definitions(value: object, schema: Json) -> object:
    """The schema of one argument, with the definitions that its references may name."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {**definitions, **value} if isinstance(value, dict) else value
