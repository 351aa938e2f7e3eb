"""What is sent: lengths, shared beginnings, conversations and traces from files."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from afd.errors import ConfigError
from afd.loadtest import recorded, workload
from afd.loadtest.workload import Lengths, Writer

IDS, WORDS = Writer("completions", 1000), Writer("chat", 1000)


def test_random_prompts_have_lengths_in_range_and_ids_in_the_vocabulary() -> None:
    asks = list(islice(workload.random_lengths(IDS, Lengths(5, 9), Lengths(3, 4), seed=1), 500))
    assert {ask.input_tokens for ask in asks} == {5, 6, 7, 8, 9}
    assert {ask.output_tokens for ask in asks} == {3, 4}
    assert all(len(ask.prompt) == ask.input_tokens for ask in asks)
    ids = {token for ask in asks for token in ask.prompt}
    assert min(ids) >= 256
    assert max(ids) < 1000
    assert asks == list(islice(workload.random_lengths(IDS, Lengths(5, 9), Lengths(3, 4), seed=1), 500))


def test_for_chat_a_prompt_is_as_many_words() -> None:
    ask = next(workload.random_lengths(WORDS, Lengths(40, 40), Lengths(1, 1), seed=0))
    assert isinstance(ask.prompt, str)
    assert len(ask.prompt.split()) == 40


@pytest.mark.parametrize("writer", [IDS, WORDS])
def test_shared_prefixes_are_few_and_tails_are_all_different(writer: Writer) -> None:
    asks = islice(workload.shared_prefixes(writer, 64, 3, Lengths(10, 10), Lengths(1, 1), seed=2), 60)
    prompts = [tuple(ask.prompt.split() if isinstance(ask.prompt, str) else ask.prompt) for ask in asks]
    assert {len(prompt) for prompt in prompts} == {74}
    assert len({prompt[:64] for prompt in prompts}) == 3
    assert len({prompt[64:] for prompt in prompts}) == 60


@pytest.mark.parametrize("text", ["", "0", "-3", "9:5", "1:2:3", "many", "1.5"])
def test_lengths_that_cannot_be_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--input-tokens"):
        Lengths.parse(text, "--input-tokens")


def conversation(*said: tuple[str, object]) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": who, "value": what} for who, what in said]}


def test_sharegpt_gives_the_first_question_of_each_conversation_that_begins_with_one(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    conversations = [
        conversation(("human", "What is a cat?"), ("gpt", "a" * 40), ("human", "And a dog?")),
        conversation(("system", "be brief"), ("user", "Wörter"), ("assistant", "ja")),
        conversation(("gpt", "I begin"), ("human", "no")),
        conversation(("human", "alone")),
        conversation(("human", None), ("gpt", "answer")),
        {"id": "empty"},
    ]
    file.write_text(json.dumps(conversations))
    asks = list(islice(recorded.sharegpt(file, None, seed=0), 6))
    assert {(ask.prompt, ask.output_tokens) for ask in asks} == {("What is a cat?", 10), ("Wörter", 1)}
    for first, second in (asks[0:2], asks[2:4], asks[4:6]):  # each once before any comes again
        assert first.prompt != second.prompt
    lines = tmp_path / "sharegpt.jsonl"
    lines.write_text("\n".join(map(json.dumps, conversations)))
    assert list(islice(recorded.sharegpt(lines, None, seed=0), 6)) == asks
    assert next(recorded.sharegpt(file, Lengths(9, 9), seed=0)).output_tokens == 9


@pytest.mark.parametrize("text", ["[]", "{", '{"conversations": []}', "[1, 2]"])
def test_a_file_without_conversations_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json"):
        recorded.sharegpt(file, None, 0)


def test_a_trace_gives_its_lengths_at_its_times_after_the_first(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [(1012.5, 30, 4), (1010.0, 10, 2), (1010.25, 20, 3)]
    file.write_text(
        "".join(json.dumps({"timestamp": t, "input_length": i, "output_length": o}) + "\n\n" for t, i, o in lines)
    )
    asks = list(recorded.trace(file, IDS, seed=0))
    assert [(ask.at_s, ask.input_tokens, ask.output_tokens) for ask in asks] == [
        (0.0, 10, 2),
        (0.25, 20, 3),
        (2.5, 30, 4),
    ]
    assert [len(ask.prompt) for ask in asks] == [10, 20, 30]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{}", "line 2: not"),
        ("nonsense", "line 2: not"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 5}', "line 2: lengths are 0 and 5"),
    ],
)
def test_a_line_that_is_none_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"timestamp": 0, "input_length": 1, "output_length": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match=sentence):
        recorded.trace(file, IDS, 0)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        recorded.trace(tmp_path / "none.jsonl", IDS, 0)
