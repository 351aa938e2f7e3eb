"""Tool calls in a model's own words: how they are told to it, read from its answers, and forced by a grammar.

A format is one model family's convention. `ToolFormat` is stateless; `CallParser` follows one answer.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from router.answers.tools.fields import Function, Tool

MAX_CALLS = 16  # in one answer that is forced to call

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of the answer's call number `index`. The first piece of a call has its `name`, all may have
    `arguments`: text which, joined, is a JSON object, unless the answer was cut off or the model wrote none."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Parsed:
    """What a piece of an answer says: text to read, and pieces of calls."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class CallParser(ABC):
    """Follows one answer. `push` its text in pieces, then `flush` once. What comes out, joined, does not depend on the
    pieces. White space around calls is dropped; what looks like a call and is none is content."""

    @abstractmethod
    def push(self, text: str) -> Parsed:
        """What `text` makes certain."""

    @abstractmethod
    def flush(self, *, forced: bool = False) -> Parsed:
        """What is left, when no more comes. The beginning of a tag at the end is text, unless calls are `forced`, or
        some have come already: then it is a call, cut off."""


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Rules in llguidance's Lark, of which `calls` is one call or several, and the grammars, by name, that they take in
    with @name. `params` says by name which field of the request one comes from."""

    rules: str
    grammars: Mapping[str, Json]
    params: Mapping[str, str]


class ToolFormat(ABC):
    """A convention. `tags` are the texts that it is recognised by, some of which may be special tokens."""

    name: str
    tags: tuple[str, ...]

    @abstractmethod
    def parser(self, tools: Sequence[Tool]) -> CallParser:
        """For one answer to a request with `tools`."""

    @abstractmethod
    def grammar(self, functions: Sequence[Function], most: int, tag: Callable[[str], str]) -> CallGrammar:
        """One to `most` calls of `functions`. `tag` gives the Lark for one of `tags`."""

    # For chat templates that know no tools:

    @abstractmethod
    def describe(self, tools: Sequence[Tool]) -> str:
        """What the system message says of the tools."""

    @abstractmethod
    def call_text(self, name: str, arguments: Json) -> str:
        """A call as the model would have written it."""

    @abstractmethod
    def result_text(self, content: str) -> str:
        """What a tool answered, as a user's message."""


def quoted(text: str) -> str:
    """A Lark literal."""
    return json.dumps(text, ensure_ascii=False)


def compact(value: object) -> str:
    """JSON as models are used to: one line, nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False)
