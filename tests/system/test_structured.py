"""Structured output and tool calls of the embedded model, through a running server: what was asked for comes."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.schemas import random_schema
from tests.system.serving import Serving, serving

pytestmark = pytest.mark.smollm2

MODEL = "smollm2"
AT_ONCE = 64
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NO_ARGUMENTS: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "description": "The time.", "parameters": NO_ARGUMENTS}},
]
SCHEMAS = {"weather": WEATHER, "time": NO_ARGUMENTS}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(MODEL, "--backend", "local", "--dtype", "bf16") as running:
        yield running


def ask_all(server: Serving, bodies: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first choice of each chat, streamed ones put together, in order; AT_ONCE of them run at a time."""

    async def ask(client: httpx.AsyncClient, gate: asyncio.Semaphore, body: dict[str, Any]) -> dict[str, Any]:
        async with gate:
            response = await client.post("/v1/chat/completions", json={"model": MODEL, "max_tokens": 300, **body})
        assert response.status_code == 200, (body, response.text)
        return joined(response.text) if body.get("stream") else response.json()["choices"][0]

    async def run() -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits) as client:
            gate = asyncio.Semaphore(AT_ONCE)
            return list(await asyncio.gather(*(ask(client, gate, body) for body in bodies)))

    return asyncio.run(run())


def joined(text: str) -> dict[str, Any]:
    """A streamed answer as the choice that it would have been."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    finish, calls = None, list[dict[str, Any]]()
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events.pop() == "[DONE]"
    for event in events:
        (choice,) = json.loads(event)["choices"]
        finish, delta = choice["finish_reason"], choice["delta"]
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                calls.append({"type": piece["type"], "function": {"name": piece["function"]["name"], "arguments": ""}})
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    return {"message": message, "finish_reason": finish}


def chat(text: str, seed: int, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0.8, "seed": seed, **fields}


def by_schema(schema: dict[str, object]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_two_hundred_random_schemas_are_kept_to(server: Serving) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(200)]
    # A number may have digits without end, and a greedy model writes them: the penalty makes it tire of them.
    fields = {"frequency_penalty": 1.0}
    bodies = [
        chat("A café in 東京?", seed, temperature=seed % 3 / 2, response_format=by_schema(schema), **fields)
        for seed, schema in enumerate(schemas)
    ]
    answers = ask_all(server, bodies)
    assert {answer["finish_reason"] for answer in answers} == {"stop"}
    for schema, answer in zip(schemas, answers, strict=True):
        jsonschema.validate(json.loads(answer["message"]["content"]), schema)


def test_forced_calls_parse_and_keep_to_the_functions_parameters(server: Serving) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    choices = ["required", named] * 4
    bodies = [
        chat("Weather in Köln?", seed, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        for seed, choice in enumerate(choices)
    ]
    for choice, answer in zip(choices, ask_all(server, bodies), strict=True):
        (call,) = answer["message"]["tool_calls"]
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        assert choice == "required" or call["function"]["name"] == "weather"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


def test_regexes_and_choices_are_kept_to(server: Serving) -> None:
    pattern, words = r"[A-ZÄÖÜ][a-zäöüß]{2,8} has [0-9]{1,3} (cats|dogs)\.", ["köln", "kölsch", "zürich", "大阪"]
    bodies = [chat("Tell me.", seed, guided_regex=pattern) for seed in range(8)]
    bodies += [chat("A place?", seed, structured_outputs={"choice": words}) for seed in range(8)]
    answers = [answer["message"]["content"] for answer in ask_all(server, bodies)]
    assert [text for text in answers[:8] if not re.fullmatch(pattern, text)] == []
    assert set(answers[8:]) <= set(words)


def test_a_streamed_answer_is_the_unstreamed_one(server: Serving) -> None:
    said = [
        *(
            chat("Zürich?", i, frequency_penalty=1.0, response_format=by_schema(random_schema(random.Random(i))))
            for i in range(6)
        ),
        *(chat("Weather in Köln?", i, tools=TOOLS, tool_choice="required", max_tokens=30 + 9 * i) for i in range(6)),
        *(chat("Weather in 東京?", i, tools=TOOLS, max_tokens=30) for i in range(6)),
    ]
    whole, streamed = ask_all(server, said), ask_all(server, [{**body, "stream": True} for body in said])
    for one, other in zip(whole, streamed, strict=True):
        for call in one["message"].get("tool_calls", ()):
            assert call.pop("id")
        one["message"]["content"] = one["message"]["content"] or None
        assert one["message"] == other["message"]
        assert one["finish_reason"] == other["finish_reason"]


def test_several_choices_of_one_request_each_follow_the_grammar(server: Serving) -> None:
    body = {"model": MODEL, "n": 6, **chat("A word?", 5, guided_regex="[a-z]{4,9}")}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert all(re.fullmatch("[a-z]{4,9}", text) for text in texts), texts
    assert len(set(texts)) > 1


def test_a_hostile_grammar_is_an_error_and_the_server_goes_on(server: Serving) -> None:
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    for fields in ({"guided_json": loop}, {"guided_regex": "([a-z]{1,9}){1,999}x", "temperature": 1.0}):
        body = {"model": MODEL, "max_tokens": 400, **chat("Go on.", 1), **fields}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 400
        assert "grammar" in response.json()["error"]["message"]
    (answer,) = ask_all(server, [chat("Yes?", 0, guided_choice=["yes"])])
    assert answer["message"]["content"] == "yes"
