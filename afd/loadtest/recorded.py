"""Workloads that somebody recorded: conversations in ShareGPT's format, and traces of when what length was asked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from afd.errors import ConfigError
from afd.loadtest.workload import Ask, Lengths, Writer

_BYTES_PER_TOKEN = 4  # of English text, about; there is no tokenizer here
_ASKERS, _ANSWERERS = frozenset({"human", "user"}), frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})


@dataclass(frozen=True, slots=True)
class Arrival:
    """A line of a trace."""

    at_s: float
    input_tokens: int
    output_tokens: int


def sharegpt(path: Path, outputs: Lengths | None, seed: int) -> Iterator[Ask]:
    """The first question of every conversation, in random order, over and over. `outputs` None: as long as the answer
    on file, at four bytes a token. Reads the file now. Raises ConfigError for a file that holds no such thing."""
    pairs = [pair for item in _conversations(path) if (pair := _first_turn(item))]
    if not pairs:
        raise ConfigError(
            f"{path} holds no conversation that begins with a question and an answer; --data sharegpt:FILE takes a "
            'JSON list of {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
        )
    return _shuffled(pairs, outputs, random.Random(seed))


def trace(path: Path, writer: Writer, seed: int) -> Iterator[Ask]:
    """A random prompt of every line's length, at the line's time after the first one's. Reads the file now. Raises
    ConfigError naming the line that is none."""
    arrivals = sorted(read_trace(path), key=lambda arrival: arrival.at_s)
    rng, first_s = random.Random(seed), arrivals[0].at_s
    return (Ask(writer.write(a.input_tokens, rng), a.input_tokens, a.output_tokens, a.at_s - first_s) for a in arrivals)


def read_trace(path: Path) -> list[Arrival]:
    """Lines of {"timestamp": seconds, "input_length": tokens, "output_length": tokens}."""
    arrivals = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = orjson.loads(line)
            arrival = Arrival(float(fields["timestamp"]), int(fields["input_length"]), int(fields["output_length"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{path}, line {number}: not {{"timestamp": s, "input_length": n, "output_length": n}} ({error!r})'
            ) from error
        if min(arrival.input_tokens, arrival.output_tokens) < 1:
            raise ConfigError(
                f"{path}, line {number}: lengths are {arrival.input_tokens} and {arrival.output_tokens}, "
                "and must be 1 or more"
            )
        arrivals.append(arrival)
    if not arrivals:
        raise ConfigError(f"{path} is empty; --data trace:FILE takes a line of JSON for each request")
    return arrivals


def _conversations(path: Path) -> list[Any]:
    """A JSON list, or a line of JSON for each."""
    text = _read(path)
    try:
        value = orjson.loads(text)
    except ValueError:
        try:
            value = [orjson.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ConfigError(f"{path} is neither JSON nor lines of JSON: {error}") from error
    return value if isinstance(value, list) else [value]


def _first_turn(item: Any) -> tuple[str, str] | None:
    """The first question and its answer; None for a conversation that does not begin so."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    said = [(turn.get("from"), turn.get("value")) for turn in turns if turn.get("from") != "system"]
    if len(said) < 2 or said[0][0] not in _ASKERS or said[1][0] not in _ANSWERERS:
        return None
    question, answer = said[0][1], said[1][1]
    return (question, answer) if isinstance(question, str) and isinstance(answer, str) and question else None


def _shuffled(pairs: list[tuple[str, str]], outputs: Lengths | None, rng: random.Random) -> Iterator[Ask]:
    while True:
        rng.shuffle(pairs)
        for question, answer in pairs:
            yield Ask(question, _tokens(question), outputs.draw(rng) if outputs else _tokens(answer))


def _tokens(text: str) -> int:
    return max(1, -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} (--data): {error.strerror}") from error
