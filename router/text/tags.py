"""Text that arrives in pieces, up to a tag such as <tool_call>. What comes out does not depend on where it is cut."""

from __future__ import annotations

from collections.abc import Sequence


class UpToTag:
    """Gives text out until one of `tags` comes. Held back until more is known: what may be the beginning of a tag, and
    white space, which is dropped where a tag follows it."""

    def __init__(self, tags: Sequence[str]) -> None:
        self._tags = tuple(tags)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """The text that is certain, the tag that ends it, if it is here, and what follows the tag."""
        buffer = self._held + text
        found = [(at, tag) for tag in self._tags if (at := buffer.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            self._held = ""
            return buffer[:at].rstrip(), tag, buffer[at + len(tag) :]
        certain = buffer[: len(buffer) - begun(buffer, self._tags)].rstrip()
        self._held = buffer[len(certain) :]
        return certain, None, ""

    def flush(self, *, tag_expected: bool = False) -> str:
        """What is still held back, when no more comes. `tag_expected`: what may be the beginning of a tag is one, which
        was cut off, and is dropped."""
        held, self._held = self._held, ""
        return (
            held[: len(held) - begun(held, self._tags)].rstrip() if tag_expected and begun(held, self._tags) else held
        )


def begun(buffer: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `buffer` that is the beginning of a tag, and not the whole of it."""
    longest = max(map(len, tags), default=1)
    for length in range(min(len(buffer), longest - 1), 0, -1):
        if any(tag.startswith(buffer[-length:]) for tag in tags):
            return length
    return 0
