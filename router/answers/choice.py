"""One choice of an answer while it grows: tokens in, text that is certain out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from afd.types import FinishReason, GenerateOutput, GenerateRequest, SampledToken
from router.answers.answer import AnswerParser
from router.answers.tools.base import CallDelta
from router.text.detokenizer import detokenizer
from router.text.stops import StopStrings
from router.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Delta:
    """What one step added to a choice. `offsets[i]` is how many characters of the choice came before `tokens[i]`.

    Tokens come out at once, text only when it is certain, so a delta may have tokens and no text. `stop_reason` is
    the stop string or stop token id of the request that ended the choice; None for EOS, as in vLLM. `reasoning` and
    `calls` are what a parser took out of the text.
    """

    index: int
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    stop_reason: str | int | None = None
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    prompt: list[SampledToken] = field(default_factory=list)  # where its logprobs are asked for, with the first token


@dataclass(frozen=True, slots=True)
class TextRules:
    """What of the tokens becomes text, and what ends it."""

    stops: tuple[str, ...] = ()
    keep_stop: bool = False  # what ended the answer, stop string or stop token, stays in its text
    keep_special: bool = False  # special tokens are text too
    parser: Callable[[], AnswerParser] | None = None  # tells reasoning and calls from content; None: all is content


class Choice:
    """Follows one request, to whichever worker. `index` is the choice's place in the answer."""

    def __init__(self, index: int, request: GenerateRequest, rules: TextRules, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.token_ids: list[int] = []
        self.first_token_at: float | None = None  # for the metrics of whoever follows, as the next
        self.last_token_at: float | None = None
        self._num_chars = 0
        self._detokenizer = detokenizer(tokenizer, request.prompt_token_ids, special=rules.keep_special)
        self._stops = StopStrings(rules.stops, keep=rules.keep_stop)
        self._keep_stop = rules.keep_stop
        self._parser = rules.parser() if rules.parser else None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def replay(self) -> GenerateRequest:
        """The request for another worker to go on with, behind the tokens that came."""
        return replace(self.request, generated_token_ids=tuple(self.token_ids), replay=True)

    def accept(self, output: GenerateOutput) -> Delta:
        """Takes an output of the worker (no error) in order. After a delta with finish_reason nothing more is accepted.

        A stop string may end the choice before the worker does; the worker then has to be told.
        """
        delta = self._accept(output)
        return self._read(delta) if self._parser else delta

    def _accept(self, output: GenerateOutput) -> Delta:
        delta = Delta(self.index, prompt=list(output.prompt))
        for token in output.tokens:
            delta.tokens.append(token)
            delta.offsets.append(self._num_chars)
            self.token_ids.append(token.token_id)
            is_stop = output.stop_token_id == token.token_id and token is output.tokens[-1]
            if is_stop and not self._keep_stop:
                break  # EOS and stop tokens end the text without being part of it, as a rule
            if self._add(delta, self._detokenizer.push(token.token_id)):
                return delta
        if output.finish_reason is not None and not self._add(delta, self._detokenizer.flush()):
            delta.text += self._stops.flush()
            delta.finish_reason = output.finish_reason
            if output.stop_token_id in self.request.sampling.stop_token_ids:
                delta.stop_reason = output.stop_token_id
        return delta

    def accept_token(self, token_id: int) -> Delta:
        """The same for an ordinary token: one of an answer without logprobs that goes on."""
        delta = Delta(self.index, tokens=[SampledToken(token_id)], offsets=[self._num_chars])
        self.token_ids.append(token_id)
        self._add(delta, self._detokenizer.push(token_id))
        return self._read(delta) if self._parser else delta

    def _read(self, delta: Delta) -> Delta:
        """Tells apart what the text of `delta` says."""
        parser = self._parser
        assert parser is not None, "nothing to read with"
        read = parser.push(delta.text)
        delta.text, delta.reasoning, delta.calls = read.content, read.reasoning, read.calls
        if delta.finish_reason is not None:
            rest = parser.flush()
            delta.text += rest.content
            delta.reasoning += rest.reasoning
            delta.calls += rest.calls
            if parser.called and delta.finish_reason == "stop":
                delta.finish_reason = "tool_calls"
        return delta

    def _add(self, delta: Delta, text: str) -> bool:
        """Adds decoded text; True when a stop string ends the choice here."""
        self._num_chars += len(text)
        if len(self.token_ids) <= self.request.sampling.min_tokens:
            delta.text += text  # too early to stop
            return False
        certain, stop = self._stops.push(text)
        delta.text += certain
        if stop is None:
            return False
        delta.finish_reason, delta.stop_reason = "stop", stop
        return True
