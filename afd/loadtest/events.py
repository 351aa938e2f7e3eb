"""Reads the events of one streamed answer as they come, and what a refusal says."""

from __future__ import annotations

from typing import Any

import orjson

from afd.loadtest.record import CUT, IN_STREAM, OK, Record

_DONE = b"[DONE]"
_MOST_BODY = 1 << 16  # bytes of a refusal that are kept


class Answer:
    """Fed with the bytes of one HTTP answer; writes what they say into `record`."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.new_events = 0  # with text, since somebody last set it to 0
        self._rest = b""
        self._finished = self._done = False

    def stream(self, piece: bytes, at_s: float) -> None:
        """Bytes of a streamed answer that came at `at_s`."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), at_s)

    def refusal(self, piece: bytes) -> None:
        """Bytes of an answer that is not a stream."""
        if len(self._rest) < _MOST_BODY:
            self._rest += piece

    def end(self, http_status: int, streamed: bool) -> None:
        """The HTTP answer is complete."""
        record = self.record
        if not streamed:
            record.status = str(http_status) if http_status != 200 else "not a stream"
            record.error = sentence(self._rest) or f"HTTP {http_status}"
        elif not record.status:
            whole = self._done or self._finished
            record.status = OK if whole else CUT
            record.error = "" if whole else "the stream ended before its answer did"

    def _event(self, data: bytes, at_s: float) -> None:
        if data == _DONE:
            self._done = True
            return
        record = self.record
        try:
            event: dict[str, Any] = orjson.loads(data)
            if event.get("error"):
                record.status, record.error = IN_STREAM, sentence(data)
                return
            for choice in event.get("choices") or ():
                self._choice(choice, at_s)
            if usage := event.get("usage"):
                record.output_tokens, record.counted = int(usage["completion_tokens"]), True
                record.input_tokens = int(usage["prompt_tokens"])
        except (ValueError, KeyError, TypeError, AttributeError):
            record.status, record.error = IN_STREAM, f"no event of OpenAI's API: {data[:200]!r}"

    def _choice(self, choice: dict[str, Any], at_s: float) -> None:
        record = self.record
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else _said(delta)
        if text:
            record.times.append(at_s)
            self.new_events += 1
            if not record.counted:
                record.output_tokens += 1
        if choice.get("finish_reason") is not None:
            self._finished = True
            record.last_s = at_s


def _said(delta: dict[str, Any]) -> object:
    """What a chat delta adds to the answer, of whatever kind."""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")


def sentence(body: bytes) -> str:
    """The message of an error in OpenAI's shape, or the beginning of whatever else it is."""
    try:
        error = orjson.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace").strip()[:300]
