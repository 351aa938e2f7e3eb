"""Grammars that answers must keep to: compiled on a thread of their own, then followed token by token. No tensors."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from afd import grammar as rules

log = logging.getLogger(__name__)

MAX_KEPT = 64  # compiled grammars


class Matcher:
    """Where one answer stands in its grammar. Its state follows from the tokens taken, and from nothing else: a
    sequence keeps it when it is preempted, and a step that fails leaves it as it was.

    `problem`, once set, is the sentence that ends the request: the grammar turned out to cost too much, or allows
    nothing any more.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.problem = ""
        self._matcher = matcher

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, [vocab]: never none, except with `problem`. EOS where the answer may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._look()
        return np.unpackbits(bits, bitorder="little").view(np.bool_)

    def take(self, token_id: int) -> bool:
        """Goes on by one token; whether the answer is complete: it was EOS, or nothing but EOS could follow."""
        self._matcher.consume_token(token_id)
        self._look()
        return not self.problem and self._matcher.is_stopped()

    def follow(self, token_ids: Sequence[int]) -> None:
        """Goes on by several tokens at once, behind which the answer is not complete."""
        if token_ids:
            self._matcher.consume_tokens(list(token_ids))
            self._look()

    def fail(self, problem: str) -> None:
        """Ends the request with `problem`, unless it has one."""
        self.problem = self.problem or problem

    def copy(self) -> Matcher:
        """Another one in the same state."""
        return Matcher(self._matcher.deep_copy())

    def _look(self) -> None:
        if self._matcher.is_error():
            self.problem = f"the answer cannot go on in its grammar: {rules.in_one_line(self._matcher.get_error())}"


Compiled = Callable[[Matcher | str], None]  # a matcher at the beginning, or a sentence on why there is none


class Grammars:
    """Compiles for one model. `vocab` is the model's, which may be larger than the tokenizer's: the tokens beyond are
    never allowed. The tokenizer is read when the first grammar comes."""

    def __init__(self, tokenizer_json: Path | None, vocab: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab = vocab
        self._eos_token_ids = eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Matcher] = OrderedDict()  # the one used last at the end
        self._thread = ThreadPoolExecutor(1, "grammars")

    def compile(self, grammar: str, done: Compiled, wanted: Callable[[], bool] = lambda: True) -> None:
        """Returns at once; `done` is called from the thread that compiles, unless `wanted` then says that nobody waits
        for it any more. May be called from any thread."""
        self._thread.submit(self._compile, grammar, done, wanted)

    def close(self) -> None:
        """Drops what is not compiled yet. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str, done: Compiled, wanted: Callable[[], bool]) -> None:
        if not wanted():
            return
        try:
            done(self._matcher(grammar))
        except Exception as error:
            log.exception("a grammar was not compiled")
            done(f"the attention worker failed to compile the grammar: {error}")

    def _matcher(self, grammar: str) -> Matcher | str:
        first = self._kept.get(grammar)
        if first is None:
            if problem := rules.problem(grammar):
                return f"the grammar is not valid: {problem}"
            if self._tokenizer_json is None:
                return "this model has no tokenizer.json, without which no grammar can be followed"
            first = Matcher(LLMatcher(self._read_tokenizer(), grammar, log_level=0, limits=rules.limits()))
            first.allowed()  # also prepares what the copies share, off the engine's thread
            if first.problem:
                return first.problem
            self._kept[grammar] = first
        self._kept.move_to_end(grammar)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return first.copy()

    def _read_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                str(self._tokenizer_json), n_vocab=self._vocab, eos_token=list(self._eos_token_ids) or None
            )
        return self._tokenizer
