"""Reasoning: what a model thinks before it answers, up to a closing tag. The tags are the same for every parser; they
differ in what they take an answer without an opening tag for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from router.text.tags import UpToTag

OPEN, CLOSE = "<think>", "</think>"

Prompt = Literal["open", "closed", "silent"]


def said_by(prompt: str) -> Prompt:
    """Whether a prompt, as the chat template wrote it, ends inside of reasoning, right behind it, or without a word."""
    end = prompt.rstrip()
    return "open" if end.endswith(OPEN) else "closed" if end.endswith(CLOSE) else "silent"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """One way to tell reasoning from the answer. `assumed`: an answer without an opening tag begins inside of it."""

    name: str
    assumed: bool

    def expects(self, prompt: Prompt) -> Literal["yes", "maybe", "no"]:
        """Whether an answer to `prompt` begins with reasoning. "maybe": where it opens with the tag."""
        if prompt == "closed":
            return "no"
        return "yes" if self.assumed or prompt == "open" else "maybe"

    def parser(self, prompt: Prompt) -> ReasoningParser:
        """For one answer to `prompt`."""
        return ReasoningParser(self.expects(prompt))


class ReasoningParser:
    """Splits one answer, which arrives in pieces, into (reasoning, rest). White space around the tags is dropped.
    An answer that ends before the closing tag is all reasoning."""

    def __init__(self, expected: Literal["yes", "maybe", "no"]) -> None:
        self._expected = expected
        self._beginning: str | None = "" if expected != "no" else None  # None: it is past
        self._inside = UpToTag([CLOSE]) if expected == "yes" else None
        self._trim = False  # white space that comes now belongs to a tag

    def push(self, text: str) -> tuple[str, str]:
        """What `text` makes certain."""
        if self._beginning is not None:
            self._beginning += text
            start = self._beginning.lstrip()
            if not start or (len(start) < len(OPEN) and OPEN.startswith(start)):
                return "", ""  # may still be the opening tag
            text, self._beginning = self._beginning, None
            if start.startswith(OPEN):
                text, self._trim, self._inside = start[len(OPEN) :], True, UpToTag([CLOSE])
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        if self._inside is None:
            return "", text
        reasoning, closed, rest = self._inside.push(text)
        if closed is None:
            return reasoning, ""
        self._inside, rest = None, rest.lstrip()
        self._trim = not rest
        return reasoning, rest

    def flush(self) -> tuple[str, str]:
        """What is left, when no more comes."""
        beginning, self._beginning = self._beginning or "", None
        if self._inside is not None:
            return beginning + self._inside.flush(), ""
        return "", beginning
