"""Answers as OpenAI's JSON, whole or as server-sent chunks; token ids where vLLM puts them.

Pure: deltas in, bytes or JSON values out. The two endpoints differ in where text, role, logprobs and prompt token ids
stand; `Shape` is what they share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from afd.types import SampledToken
from router.answers.choice import Delta
from router.answers.tools.base import CallDelta
from router.relay.job import Job
from router.text.detokenizer import offsets
from router.text.tokenizer import Tokenizer

Json = dict[str, object]

_MARK = "text"  # of the chunk from which frames are cut; in JSON nothing like it follows
DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no -infinity; the number OpenAI and vLLM give for "impossible"


def event(content: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + content + b"\n\n"


def usage(num_prompt_tokens: int, num_generated: int, num_cached: int | None = None) -> Json:
    """`num_cached`: prompt tokens found computed; None, and left out, while that is not known of all."""
    details = {} if num_cached is None else {"prompt_tokens_details": {"cached_tokens": num_cached}}
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
        **details,
    }


@dataclass(frozen=True, slots=True)
class Style:
    """What the client asked the answer to hold."""

    model: str
    created: int  # seconds since 1970
    tokenizer: Tokenizer
    num_logprobs: int | None  # alternatives beside each token; None: no logprobs
    token_ids: bool
    usage_chunk: bool
    usage_in_chunks: bool = False  # every chunk says what was generated so far
    ids_for_tokens: bool = False  # logprobs name tokens "token_id:5"
    fingerprint: str | None = None


class Shape(ABC):
    """How one job's answer is written."""

    object_whole: str
    object_chunk: str

    def __init__(self, job: Job, style: Style) -> None:
        self._job = job
        self._tokenizer = style.tokenizer
        self._num_logprobs = style.num_logprobs
        self._token_ids = style.token_ids
        self._usage_chunk = style.usage_chunk
        self._usage_in_chunks = style.usage_in_chunks
        self._ids_for_tokens = style.ids_for_tokens
        self._num_said = 0  # tokens, over all choices
        self._frames: dict[int, tuple[bytes, bytes, bytes]] = {}
        self._head: Json = {
            "id": job.job_id,
            "object": self.object_chunk,
            "created": style.created,
            "model": style.model,
            "system_fingerprint": style.fingerprint,
        }

    def opening(self) -> bytes:
        """Chunks before the first token."""
        return b""

    def chunks(self, deltas: Iterable[Delta]) -> bytes:
        """One chunk for each delta that says something."""
        if self._usage_in_chunks:
            return b"".join([self._counted(d) for d in deltas])
        return b"".join([self._ordinary(d) or self._chunk(self._delta(d)) for d in deltas if self._speaks(d)])

    def _counted(self, delta: Delta) -> bytes:
        self._num_said += len(delta.tokens)
        return self._chunk(self._delta(delta)) if self._speaks(delta) else b""

    def closing(self, num_generated: int, num_cached: int) -> bytes:
        """Chunks after the last token."""
        if not self._usage_chunk:
            return DONE
        total = usage(self._job.num_prompt_tokens, num_generated, num_cached)
        return event(orjson.dumps({**self._head, "choices": [], "usage": total})) + DONE

    def whole(self, answers: Sequence[Delta], num_generated: int, num_cached: int) -> bytes:
        """The answer that is not streamed; `answers` in the order of their index."""
        return orjson.dumps(
            {
                **self._head,
                "object": self.object_whole,
                "choices": [self._choice(answer) for answer in answers],
                "usage": usage(self._job.num_prompt_tokens, num_generated, num_cached),
                **self._whole_extras(),
            }
        )

    @abstractmethod
    def _delta(self, delta: Delta) -> Json:
        """A choice of a chunk."""

    @abstractmethod
    def _choice(self, answer: Delta) -> Json:
        """A choice of a whole answer."""

    @abstractmethod
    def _logprobs(self, delta: Delta) -> Json:
        """The logprobs of a delta's tokens."""

    def _whole_extras(self) -> Json:
        return {}

    def _chunk(self, choice: Json, extras: Json | None = None) -> bytes:
        chunk = {**self._head, "choices": [choice], **(extras or {})}
        if self._usage_chunk:
            so_far = usage(self._job.num_prompt_tokens, self._num_said)
            chunk["usage"] = so_far if self._usage_in_chunks else None
        return event(orjson.dumps(chunk))

    def _ordinary(self, delta: Delta) -> bytes:
        """The chunk of a delta that has text and nothing out of the ordinary, written around its text; else b""."""
        if (
            not delta.text
            or delta.reasoning
            or delta.calls
            or delta.finish_reason is not None
            or self._num_logprobs is not None
        ):
            return b""
        frame = self._frames.get(delta.index) or self._frame(delta.index)
        before, after, end = frame
        if not self._token_ids:
            return before + orjson.dumps(delta.text) + after
        ids = orjson.dumps([token.token_id for token in delta.tokens])
        return before + orjson.dumps(delta.text) + after + ids + end

    def _frame(self, index: int) -> tuple[bytes, bytes, bytes]:
        """What stands in the chunks of a choice before its text, between text and token ids, and after those."""
        whole = self._chunk(self._delta(Delta(index, _MARK)))
        before, after = whole.rsplit(orjson.dumps(_MARK), 1)
        end = b""
        if self._token_ids:
            after, end = after.rsplit(b"[]", 1)
        frame = self._frames[index] = (before, after, end)
        return frame

    def _speaks(self, delta: Delta) -> bool:
        tokens_matter = self._token_ids or self._num_logprobs is not None
        return bool(
            delta.text or delta.reasoning or delta.calls or delta.finish_reason or (tokens_matter and delta.tokens)
        )

    def _end_of_choice(self, delta: Delta) -> Json:
        """What a choice of either endpoint holds beside its text."""
        end: Json = {
            "logprobs": None if self._num_logprobs is None else self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._token_ids:
            end["token_ids"] = [token.token_id for token in delta.tokens]
        return end

    def _token_text(self, token_id: int) -> str:
        if self._ids_for_tokens:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")


class ChatShape(Shape):
    """chat.completion and chat.completion.chunk."""

    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def opening(self) -> bytes:
        opened = []
        for index in range(len(self._job.prompts) * self._job.n):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            opened.append(self._chunk(choice, self._whole_extras()))
        return b"".join(opened)

    def _delta(self, delta: Delta) -> Json:
        content: Json = {"content": delta.text} if delta.text else {}
        if delta.reasoning:
            content["reasoning_content"] = delta.reasoning
        if delta.calls:
            content["tool_calls"] = [self._call_piece(delta.index, piece) for piece in delta.calls]
        return {"index": delta.index, "delta": content, **self._end_of_choice(delta)}

    def _choice(self, answer: Delta) -> Json:
        message: Json = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = self._calls(answer)
        return {"index": answer.index, "message": message, **self._end_of_choice(answer)}

    def _call_piece(self, index: int, piece: CallDelta) -> Json:
        """The first piece of a call names it."""
        if piece.name is None:
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        function = {"name": piece.name, "arguments": piece.arguments}
        return {"index": piece.index, "id": self._call_id(index, piece), "type": "function", "function": function}

    def _calls(self, answer: Delta) -> list[Json]:
        arguments: dict[int, str] = {}
        for piece in answer.calls:
            arguments[piece.index] = arguments.get(piece.index, "") + piece.arguments
        return [
            {
                "id": self._call_id(answer.index, piece),
                "type": "function",
                "function": {"name": piece.name, "arguments": arguments[piece.index]},
            }
            for piece in answer.calls
            if piece.name is not None
        ]

    def _call_id(self, index: int, piece: CallDelta) -> str:
        """Unique, as the job's own id is."""
        return f"call_{self._job.job_id.rpartition('-')[2]}_{index}_{piece.index}"

    def _whole_extras(self) -> Json:
        return {"prompt_token_ids": self._job.prompts[0]} if self._token_ids else {}

    def _logprobs(self, delta: Delta) -> Json:
        return {"content": [self._token_logprob(token) for token in delta.tokens]}

    def _token_logprob(self, token: SampledToken) -> Json:
        top = [self._entry(token_id, logprob) for token_id, logprob in token.top_logprobs[: self._num_logprobs]]
        return {**self._entry(token.token_id, token.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._token_text(token_id), "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionShape(Shape):
    """text_completion, whole and in chunks."""

    object_whole = "text_completion"
    object_chunk = "text_completion"

    def opening(self) -> bytes:
        if not self._token_ids and not self._job.echoes:
            return b""
        opened = []
        for index in range(len(self._job.prompts) * self._job.n):
            choice = {"index": index, "text": self._echo(index), "logprobs": None, "finish_reason": None}
            opened.append(self._chunk(choice | self._prompt_ids(index)))
        return b"".join(opened)

    def _delta(self, delta: Delta) -> Json:
        return {"index": delta.index, "text": delta.text, **self._end_of_choice(delta)}

    def _choice(self, answer: Delta) -> Json:
        text = self._echo(answer.index) + answer.text
        return {"index": answer.index, "text": text, **self._end_of_choice(answer), **self._prompt_ids(answer.index)}

    def _prompt_ids(self, index: int) -> Json:
        return {"prompt_token_ids": self._job.prompts[index // self._job.num_kept]} if self._token_ids else {}

    def _echo(self, index: int) -> str:
        """The prompt, where it is to come before its answers."""
        return self._job.echoes[index // self._job.num_kept] if self._job.echoes else ""

    def _logprobs(self, delta: Delta) -> Json:
        """With the echo's, where there is one: in a stream they come with the first token."""
        echo, tokens = self._echo(delta.index), delta.prompt + delta.tokens
        before = offsets(self._tokenizer, [t.token_id for t in delta.prompt], echo) if delta.prompt else []
        return {
            "tokens": [self._token_text(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._top(token) for token in tokens],
            "text_offset": before + [len(echo) + offset for offset in delta.offsets],
        }

    def _top(self, token: SampledToken) -> Json:
        """The best alternatives by text, and the token itself, which may be one more."""
        top: Json = {self._token_text(i): _finite(value) for i, value in token.top_logprobs[: self._num_logprobs]}
        return top | {self._token_text(token.token_id): _finite(token.logprob)}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)
