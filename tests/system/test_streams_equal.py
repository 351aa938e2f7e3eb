"""500 random requests: an answer that is streamed is the answer that is not, and stop strings end both where they must.

The model is random and its tokens are bytes, so characters come in pieces, and often broken. Each request is made
three times: without stop strings, which says where they have to cut; with them; and with them, streamed. A stream only
ever appends, so if its parts add up to the text before the stop string, no part of one was ever shown.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tiny
from tests.system.raw_http import Connection, at_once
from tests.system.serving import Serving, serving, until

MODEL = "tiny"
REQUESTS = 500
AT_ONCE = 48
SECONDS = 60.0  # longest wait for an answer
PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
PROMPTS = [
    "Grüezi, wie gaht's?",
    "東京は夜の七時",
    "Привет, мир",
    "مرحبا بالعالم",
    "שלום",
    "नमस्ते दुनिया",
    "🙂👩‍👩‍👧🇨🇭",
    "plain",
]
ALPHABETS = ["a", "ab", "ab ", "äöü", "日本", "日本語の", "😀😁", "🇨🇭", "aé日😀", "Привет ", "नमस्ते", "ab日"]

Json = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    model = tiny.write(tmp_path_factory.mktemp("models") / MODEL)
    with serving(model, "--backend", "local") as running:
        yield running


def request(seed: int) -> tuple[str, Json]:
    """Its kind and its body, without stop strings."""
    rng = random.Random(seed)
    alphabet, prompt = rng.choice(ALPHABETS), rng.choice(PROMPTS)
    kind = rng.choice(list(PATHS))
    body: Json = {"model": MODEL, "seed": seed, "return_token_ids": True, "temperature": rng.choice([0, 0.7, 1, 2])}
    body["max_tokens"] = rng.randint(1, 40)
    body |= {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}
    if rng.random() < 0.4:
        body["n"] = rng.randint(2, 3)
    allowed = sorted(set(tiny.byte_ids(alphabet.encode())))
    match rng.randrange(4):
        case 0:  # whole characters
            body["guided_regex"] = f"[{alphabet}]{{1,40}}"
        case 1:  # pieces of characters, in any order
            body["allowed_token_ids"] = allowed
        case 2:  # mostly those
            body["logit_bias"] = {str(token): 4 for token in allowed}
        case _:
            body["ignore_eos"] = rng.random() < 0.5
    if rng.random() < 0.5:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 3)} if kind == "chat" else {"logprobs": 2}
    if kind == "text":
        body["echo"] = rng.random() < 0.3
    return kind, body


def with_stops(seed: int, kind: str, body: Json, texts: list[str]) -> Json:
    """The request with stop strings of 1 to 12 characters: pieces of what it would say, and such as almost are."""
    rng = random.Random(f"stops {seed}")
    stops = []
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        said = rng.choice(texts)
        length = min(rng.choice([1, 2, 3, 5, 8, 12]), len(said))
        begin = rng.randint(0, len(said) - length)
        piece = said[begin : begin + length]
        if len(piece) > 1 and rng.random() < 0.3:
            piece = piece[:-1] + rng.choice("aé日😀")
        stops += [piece] if piece else []
    fields = {"stop": stops, "include_stop_str_in_output": rng.random() < 0.3}
    return {**body, **fields} if stops else body


def cut(text: str, body: Json) -> tuple[str, str | None]:
    """The text up to the stop string whose last character comes first, and that stop string."""
    found = [(at + len(stop), at, stop) for stop in body.get("stop", ()) if (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    end, at, stop = min(found)
    return text[: end if body["include_stop_str_in_output"] else at], stop


async def ask(connection: Connection, asked: tuple[str, Json]) -> list[Json]:
    """The choices of an answer; streamed ones put together."""
    kind, body = asked
    answer = await asyncio.wait_for(connection.ask(PATHS[kind], json.dumps(body).encode()), SECONDS)
    assert answer.status == 200, (body, answer.body)
    if not body.get("stream"):
        whole = json.loads(answer.body)
        return [{**flat(choice), "usage": counts(whole)} for choice in whole["choices"]]
    events = [event.removeprefix("data: ") for event in answer.body.decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return joined([json.loads(event) for event in events[:-2]])


def flat(choice: Json) -> Json:
    """A choice, or a piece of one, of either endpoint, in one form. Every choice and the first piece says the prompt's
    token ids on its own."""
    said = choice.get("message") or choice.get("delta") or choice
    logprobs = choice.get("logprobs")
    return {
        "text": said.get("content", said.get("text", "")),
        "token_ids": choice.get("token_ids", []),
        "logprobs": {"content": logprobs} if isinstance(logprobs, list) else logprobs or {},
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice.get("stop_reason"),
    }


def joined(chunks: list[Json]) -> list[Json]:
    """The choices that a stream's chunks add up to. Nothing comes after the piece that has a finish_reason."""
    choices: dict[int, Json] = {}
    *pieces, last = chunks
    assert last["choices"] == []
    for piece in (choice for chunk in pieces for choice in chunk["choices"]):
        new = flat(piece)
        choice = choices.setdefault(
            piece["index"], {"text": "", "token_ids": [], "logprobs": {}, "finish_reason": None}
        )
        assert choice["finish_reason"] is None, "a choice went on after its end"
        for name, values in new["logprobs"].items():
            choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
        choice["text"] += new["text"]
        choice["token_ids"] += new["token_ids"]
        choice |= {"finish_reason": new["finish_reason"], "stop_reason": new["stop_reason"]}
    return [{**choices[index], "usage": counts(last)} for index in sorted(choices)]


def counts(answer: Json) -> Json:
    """Tokens of the answer; how many of them were cached is a matter of who came before."""
    return {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}


def test_500_streams_are_byte_for_byte_the_whole_answers_and_show_no_part_of_a_stop_string(server: Serving) -> None:
    asked = [request(seed) for seed in range(REQUESTS)]

    def ask_all(requests: list[tuple[str, Json]]) -> list[list[Json]]:
        return asyncio.run(at_once(ask, requests, server.url, AT_ONCE))

    unstopped = ask_all(asked)
    stopped = [
        (kind, with_stops(seed, kind, body, [choice["text"] for choice in choices]))
        for seed, ((kind, body), choices) in enumerate(zip(asked, unstopped, strict=True))
    ]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    answers = ask_all(stopped + [(kind, body | stream) for kind, body in stopped])
    whole, streamed = answers[:REQUESTS], answers[REQUESTS:]
    hits, multibyte, broken = 0, 0, 0
    for (_, body), base, one, other in zip(stopped, unstopped, whole, streamed, strict=True):
        assert json.dumps(one) == json.dumps(other), body
        prompt = body["prompt"] if body.get("echo") else ""
        for before, after in zip(base, one, strict=True):
            text, stop = cut(before["text"].removeprefix(prompt), body)
            assert after["text"] == prompt + text, body
            if stop is not None:
                assert (after["finish_reason"], after["stop_reason"]) == ("stop", stop), body
            hits += stop is not None
            multibyte += len(text.encode()) > len(text)
            broken += "\ufffd" in text
    print(f"{hits} choices ended at a stop string, {multibyte} have multi-byte text, {broken} broken characters")
    assert min(hits, multibyte, broken) > 100, (hits, multibyte, broken)
    until(lambda: server.blocks_used() == 0)
