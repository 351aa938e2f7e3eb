"""What a chat's answer may be, and how it is read: reasoning, content and tool calls.

`Answers` turns a request into a Plan: the grammar that the workers keep to, and a parser for each choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from router.answers.reasoning.base import CLOSE, OPEN, Prompt, Reasoning, ReasoningParser, said_by
from router.answers.tools.base import MAX_CALLS, CallDelta, CallGrammar, CallParser, Json, ToolFormat, quoted
from router.answers.tools.fields import Tool
from router.openai import structured
from router.openai.schema import ChatRequest, CompletionRequest
from router.openai.structured import Answer
from router.text.tokenizer import Tokenizer, off_loop


@dataclass(slots=True)
class Read:
    """What a piece of an answer says."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class AnswerParser:
    """Reads one choice. `push` its text in pieces, then `flush` once: what comes out, joined, does not depend on the
    pieces. With `only_first`, calls after the first are dropped. `forced`: it can be nothing but calls."""

    def __init__(
        self, reasoning: ReasoningParser | None, calls: CallParser | None, *, only_first: bool, forced: bool = False
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._only_first = only_first
        self._forced = forced
        self.called = False  # a tool, so far

    def push(self, text: str) -> Read:
        """What `text` makes certain."""
        reasoning, content = self._reasoning.push(text) if self._reasoning else ("", text)
        return self._read(reasoning, content)

    def flush(self) -> Read:
        """What is left, when no more comes."""
        reasoning, content = self._reasoning.flush() if self._reasoning else ("", "")
        read = self._read(reasoning, content)
        if self._calls is not None:
            rest = self._calls.flush(forced=self._forced)
            read.content += rest.content
            read.calls += self._kept(rest.calls)
        return read

    def _read(self, reasoning: str, content: str) -> Read:
        if self._calls is None:
            return Read(reasoning, content)
        parsed = self._calls.push(content)
        return Read(reasoning, parsed.content, self._kept(parsed.calls))

    def _kept(self, calls: list[CallDelta]) -> list[CallDelta]:
        kept = [call for call in calls if call.index == 0 or not self._only_first]
        self.called = self.called or bool(kept)
        return kept


_Forced = Callable[[], CallGrammar | None]  # what an answer may call; takes time


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Plan:
    """`parser` makes one for each choice; None: all text is content. `keep_special`: a tag that the parsers look for
    is a special token, which is therefore part of the text."""

    grammar: str = ""
    parser: Callable[[], AnswerParser] | None = None
    keep_special: bool = False


class Answers:
    """Of one model, with its conventions."""

    def __init__(self, tools: ToolFormat, reasoning: Reasoning | None, tokenizer: Tokenizer) -> None:
        self.tools = tools
        self._reasoning = reasoning
        self._tokenizer = tokenizer

    async def completion(self, request: CompletionRequest, num_bytes: int) -> Plan:
        """`num_bytes`: how long the request's body was. Raises RequestError for a grammar that cannot be followed."""
        answer = request.answer()
        return Plan() if answer is None else Plan(await self._grammar(answer, _nothing, "closed", num_bytes))

    async def chat(self, request: ChatRequest, prompt: str, num_bytes: int) -> Plan:
        """`prompt` as the chat template wrote it; `num_bytes`: how long the request's body was.

        Raises RequestError for a grammar that cannot be followed."""
        answer, tools, said = request.answer(), request.offered_tools, said_by(prompt)
        may_force = bool(tools) and (answer is not None or request.must_call)
        grammar = ""
        if may_force or answer:
            wanted = None if request.must_call else answer
            forced: _Forced = partial(self._forced, request, tools) if may_force else _nothing
            grammar = await self._grammar(wanted, forced, said, num_bytes)
        if not tools and self._reasoning is None:
            return Plan(grammar)
        tags = [*(self.tools.tags if tools else ()), *((OPEN, CLOSE) if self._reasoning else ())]
        keep_special = any(self._tokenizer.special_id(tag) is not None for tag in tags)
        parser = partial(self._parser, tools, said, request.parallel_tool_calls is False, request.must_call)
        return Plan(grammar, parser, keep_special)

    def _parser(self, tools: list[Tool], said: Prompt, only_first: bool, forced: bool) -> AnswerParser:
        return AnswerParser(
            self._reasoning.parser(said) if self._reasoning else None,
            self.tools.parser(tools) if tools else None,
            only_first=only_first,
            forced=forced,
        )

    def _forced(self, request: ChatRequest, tools: list[Tool]) -> CallGrammar:
        """The calls that an answer may consist of."""
        named = request.named_tool
        functions = [tool.function for tool in tools if named in (None, tool.function.name)]
        most = 1 if named is not None or request.parallel_tool_calls is False else MAX_CALLS
        return self.tools.grammar(functions, most, self._tag)

    async def _grammar(self, answer: Answer | None, forced: _Forced, said: Prompt, num_bytes: int) -> str:
        whole, params, grammars = await off_loop(lambda: self._compose(answer, forced(), said), num_bytes)
        await structured.check(whole, params, grammars, "tools" if answer is None else answer.param)
        return whole

    def _compose(
        self, answer: Answer | None, calls: CallGrammar | None, said: Prompt
    ) -> tuple[str, dict[str, str], dict[str, Json]]:
        """The whole grammar; of each part, the field that it comes from; the parts."""
        grammars, params = dict(calls.grammars if calls else {}), dict(calls.params if calls else {})
        if answer is not None:
            grammars["answer"], params["answer"] = answer.grammar, answer.param
        body = " | ".join([*(["calls"] if calls else []), *(["@answer"] if answer else [])])
        start = f"{self._start(body, said)}{calls.rules if calls else ''}"
        return structured.compose(start, grammars), params, grammars

    def _start(self, body: str, said: Prompt) -> str:
        """The rule "start", with reasoning before `body` where it is expected."""
        expected = self._reasoning.expects(said) if self._reasoning else "no"
        if expected == "no":
            return f"start: {body}\n"
        token = self._tokenizer.special_id(CLOSE)
        thought = r"thought[lazy]: /(?s:.*)<\/think>/" if token is None else f"thought: /(?s:.*)/ <[{token}]>"
        thinking = "thought SPACE?" if expected == "yes" else f"({self._tag(OPEN)} thought SPACE?)?"
        return f"start: {thinking} ({body})\n{thought}\nSPACE: /[ \\n]{{1,4}}/\n"

    def _tag(self, text: str) -> str:
        """The Lark for a tag: special tokens have a notation of their own."""
        token = self._tokenizer.special_id(text)
        return quoted(text) if token is None else f"<[{token}]>"
