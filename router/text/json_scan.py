"""Where a JSON object ends, in text that arrives in pieces."""

from __future__ import annotations

import re

_TELLING = re.compile(r'["\\{}\[\]]')


class ObjectEnd:
    """Follows text that begins with the brace of an object, and looks at nothing but brackets and strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the text so far ends with a backslash that escapes

    def push(self, text: str) -> int | None:
        """How many characters of `text` belong to the object, if it ends in there."""
        at = 0
        if self._escaped and text:
            at, self._escaped = 1, False
        while found := _TELLING.search(text, at):
            at, char = found.end(), found[0]
            if self._in_string:
                if char == "\\":
                    self._escaped = at == len(text)
                    at += 1
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return None
