"""One suite, in OpenAI's Python client and in its Node client, against a running server with keys and a short queue.

The model is small, random and speaks bytes: what an answer has to look like is asked for, never hoped for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests import tiny
from tests.system.clients.drivers import Client, Failure, node_client, python_client
from tests.system.serving import Serving, serving, until

MODEL, KEY = "tiny", "a-key-of-ours"
OPEN, CLOSE = "<think>", "</think>"
CLOSE_ID = 258
# As Qwen's: reasoning is closed before the answer begins, unless it is asked for.
TEMPLATE = tiny.CHAT_TEMPLATE.removesuffix("{% endif %}") + (
    f"{{% if enable_thinking %}}{OPEN}{{% else %}}{OPEN}{CLOSE}{{% endif %}}{{% endif %}}"
)
DEPLOYMENT = """
attention: {{max_running: 4, kv_cache_gib: 0.05}}
router: {{api_keys_file: {keys}, max_queue: 4, reasoning_parser: deepseek_r1}}
"""
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Zürich", "大阪"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "time", "parameters": NOTHING, "strict": True}},
]
CALL = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "Zürich", "days": [1-3]\}\}\n</tool_call>'

Json = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("clients")
    (folder / "keys").write_text(f"another-key\n{KEY}\n")
    (folder / "deployment.yaml").write_text(DEPLOYMENT.format(keys=folder / "keys"))
    model = tiny.write(folder / MODEL, template=TEMPLATE, specials=(OPEN, CLOSE))
    with serving(model, str(folder / "deployment.yaml"), "--backend", "local") as running:
        running.api_key = KEY
        yield running


@pytest.fixture(scope="module", params=["python", "node"])
def client(request: pytest.FixtureRequest, server: Serving) -> Iterator[Client]:
    with {"python": python_client, "node": node_client}[request.param](server.url, KEY) as opened:
        yield opened


def chat(*texts: str, **fields: Any) -> Json:
    """A short chat with a seed; the texts are a user's and an assistant's by turns."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": MODEL, "messages": messages, "max_tokens": 12, "seed": 1, "ignore_eos": True, **fields}


def text(prompt: Any = "Grüezi 東京", **fields: Any) -> Json:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 12, "seed": 1, "ignore_eos": True, **fields}


def content(answer: Json, index: int = 0) -> str:
    choice = answer["choices"][index]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def joined(chunks: list[Json], field: str = "content", index: int = 0) -> str:
    """What the chunks of a choice add up to. `field` is of a chat's deltas."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get(field) or "" for choice in choices)


def failure(given: Any) -> Failure:
    assert isinstance(given, Failure), f"no error, but {given}"
    assert given.request_id or given.status is None
    return given


# Answers, whole and streamed


def test_a_chat_is_answered(client: Client) -> None:
    answer = client.ask("chat", chat("Guten Tag", "Hoi!", "Was ist ein Käsefondue?"))
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("chatcmpl-")
    assert answer["_request_id"]
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["prompt_tokens"] > 30
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


@pytest.mark.parametrize("what", ["chat", "completions"])
def test_a_stream_adds_up_to_the_whole_answer(client: Client, what: str) -> None:
    body = chat("日本語", max_tokens=40) if what == "chat" else text("日本語", max_tokens=40)
    whole = client.ask(what, body)
    chunks = client.ask(what, {**body, "stream": True})
    assert joined(chunks) == content(whole)
    assert len(chunks) > 5
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]][-1] == "length"
    if what == "chat":
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_the_clients_own_reading_of_a_stream_is_the_whole_answer(client: Client) -> None:
    body = chat("日本語", n=2, logprobs=True, top_logprobs=2, structured_outputs={"regex": "[a日é]{4}"}, max_tokens=40)
    whole, read = client.ask("chat", body), client.ask("chat helper", body)
    for one, other in zip(whole["choices"], read["choices"], strict=True):
        assert one["message"]["content"] == other["message"]["content"]
        assert one["logprobs"]["content"] == other["logprobs"]["content"]
        assert one["finish_reason"] == other["finish_reason"]


@pytest.mark.parametrize("what", ["chat", "completions"])
def test_usage_comes_at_the_end_of_a_stream_that_asks_for_it(client: Client, what: str) -> None:
    body = chat("a") if what == "chat" else text("a")
    usage = client.ask(what, body)["usage"]
    *chunks, last = client.ask(what, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == usage[name]
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert not any(chunk.get("usage") for chunk in client.ask(what, {**body, "stream": True}))


@pytest.mark.parametrize("what", ["chat", "completions"])
def test_n_choices_are_numbered_and_differ(client: Client, what: str) -> None:
    body = {**(chat("a") if what == "chat" else text("a")), "n": 3}
    answer = client.ask(what, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [content(answer, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 36
    chunks = client.ask(what, {**body, "stream": True})
    assert [joined(chunks, index=index) for index in range(3)] == texts


def test_equal_seeds_give_equal_answers(client: Client) -> None:
    one, same, other = (content(client.ask("chat", chat("a", seed=seed))) for seed in (7, 7, 8))
    assert one == same != other


# What tokens may come, and where they end


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_not_in_it(client: Client, stream: bool) -> None:
    body = chat("a", structured_outputs={"regex": "Zürich liegt am Zürichsee in der Schweiz"}, max_tokens=60)
    answer = client.ask("chat", {**body, "stop": ["ich l", "chsee i", "See"], "stream": stream})
    assert (joined(answer) if stream else content(answer)) == "Zür"
    end = answer[-1] if stream else answer
    assert end["choices"][0]["finish_reason"] == "stop"
    assert content(client.ask("chat", {**body, "stop": "ürichs"})) == "Zürich liegt am Z"


def test_chats_have_logprobs_of_each_token(client: Client) -> None:
    body = chat("a", logprobs=True, top_logprobs=3)
    entries = client.ask("chat", body)["choices"][0]["logprobs"]["content"]
    assert len(entries) == 12
    for entry in entries:
        assert entry["logprob"] <= 0
        top = [one["logprob"] for one in entry["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
    chunks = client.ask("chat", {**body, "stream": True})
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [entry for part in parts if part for entry in part["content"]] == entries
    assert client.ask("chat", chat("a"))["choices"][0]["logprobs"] is None


def test_completions_have_logprobs_of_each_token(client: Client) -> None:
    choice = client.ask("completions", text(logprobs=2, logit_bias={"64": 100}))["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a"] * 12
    assert logprobs["text_offset"] == list(range(12))
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert all("a" in top and 2 <= len(top) <= 3 for top in logprobs["top_logprobs"])


def test_logit_bias_forces_and_forbids(client: Client) -> None:
    (a,) = tiny.byte_ids(b"a")
    assert content(client.ask("chat", chat("a", logit_bias={str(a): 100}))) == "a" * 12
    allowed = tiny.byte_ids(b"ab")
    body = chat("a", allowed_token_ids=allowed, logit_bias={str(a): -100})
    assert content(client.ask("chat", body)) == "b" * 12


def test_completions_echo_their_prompts(client: Client) -> None:
    prompts = ["Zürich ", "大阪 "]
    answer = client.ask("completions", text(prompts, echo=True))
    plain = client.ask("completions", text(prompts))
    assert [content(answer, i) for i in (0, 1)] == [prompts[i] + content(plain, i) for i in (0, 1)]
    chunks = client.ask("completions", text(prompts, echo=True, stream=True))
    assert [joined(chunks, index=i) for i in (0, 1)] == [content(answer, i) for i in (0, 1)]
    assert content(client.ask("completions", text([65, 66], echo=True))).startswith("bc")


def test_best_of_gives_the_likeliest(client: Client) -> None:
    five = client.ask("completions", text(n=5, logprobs=0))["choices"]
    likeliest = max(five, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]))
    answer = client.ask("completions", text(best_of=5))
    assert content(answer) == likeliest["text"]
    assert answer["usage"]["completion_tokens"] == 60


# Answers of a given form


def by_schema(schema: Json) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("what", ["chat", "chat parse", "chat helper"])
def test_a_json_schema_is_kept_to(client: Client, what: str) -> None:
    for seed in range(3):
        body = chat("a", seed=seed, response_format=by_schema(WEATHER), max_tokens=80)
        answer = client.ask(what, body)
        assert answer["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(content(answer)), WEATHER)


def test_a_json_object_is_an_object(client: Client) -> None:
    (end,) = tiny.byte_ids(b"}")  # a random model comes to no end by itself
    body = chat("a", response_format={"type": "json_object"}, logit_bias={str(end): 30}, max_tokens=200)
    assert isinstance(json.loads(content(client.ask("chat", body))), dict)


def calls_of(chunks: list[Json]) -> list[Json]:
    """The calls that a stream's deltas add up to."""
    calls: list[Json] = []
    for chunk in chunks:
        for piece in chunk["choices"][0]["delta"].get("tool_calls") or ():
            if piece.get("id"):
                assert piece["index"] == len(calls)
                assert piece["type"] == "function"
                calls.append({"name": piece["function"]["name"], "arguments": ""})
            calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    return calls


@pytest.mark.parametrize("choice", ["required", "named", "auto"])
def test_tools_are_called(client: Client, choice: str) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    fields = {"tool_choice": named if choice == "named" else choice, "parallel_tool_calls": False}
    if choice == "auto":  # the model decides: here, to call
        fields["structured_outputs"] = {"regex": CALL}
        fields["logit_bias"] = {"257": -100, "258": -100}
    body = chat("Wetter?", tools=TOOLS, max_tokens=200, **fields)
    whole = client.ask("chat", body)["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    assert call["id"]
    assert call["type"] == "function"
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    assert name in (("weather",) if choice == "named" else ("weather", "time"))
    jsonschema.validate(json.loads(arguments), {"weather": WEATHER, "time": NOTHING}[name])

    chunks = client.ask("chat", {**body, "stream": True})
    assert calls_of(chunks) == [{"name": name, "arguments": arguments}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not joined(chunks)
    for what in ("chat helper", "chat parse"):
        (read,) = client.ask(what, body)["choices"][0]["message"]["tool_calls"]
        assert (read["function"]["name"], read["function"]["arguments"]) == (name, arguments)
        assert read["function"].get("parsed_arguments", json.loads(arguments)) == json.loads(arguments)


def test_without_a_call_there_is_text(client: Client) -> None:
    for choice in ("none", "auto"):
        body = chat("a", tools=TOOLS, tool_choice=choice, allowed_token_ids=tiny.byte_ids(b"ab"))
        answer = client.ask("chat", body)
        assert set(content(answer)) <= set("ab")
        assert not answer["choices"][0]["message"].get("tool_calls")


def test_a_tools_result_goes_back_to_the_model(client: Client) -> None:
    body = chat("Wetter?", tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    message = client.ask("chat", body)["choices"][0]["message"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Föhn, 24 °C"}
    after = {**body, "tool_choice": "auto", "max_tokens": 8, "messages": [*body["messages"], message, result]}
    answer = client.ask("chat", after)
    assert content(answer)
    longer = len(call["function"]["arguments"]) + len(result["content"])
    assert answer["usage"]["prompt_tokens"] > client.ask("chat", body)["usage"]["prompt_tokens"] + longer
    assert joined(client.ask("chat", {**after, "stream": True})) == content(answer)


def test_reasoning_is_told_from_the_answer(client: Client) -> None:
    allowed = [*tiny.byte_ids("né".encode()), CLOSE_ID]
    body = chat("a", allowed_token_ids=allowed, max_tokens=120, chat_template_kwargs={"enable_thinking": True})
    bodies = [{**body, "seed": seed} for seed in range(4)]
    messages = [client.ask("chat", one)["choices"][0]["message"] for one in bodies]
    assert any(message.get("reasoning_content") for message in messages)
    for one, message in zip(bodies, messages, strict=True):
        assert CLOSE not in message.get("reasoning_content", "")
        assert message["content"]
        chunks = client.ask("chat", {**one, "stream": True})
        assert joined(chunks, "reasoning_content") == message.get("reasoning_content", "")
        assert joined(chunks) == message["content"]
    closed = client.ask("chat", chat("a"))["choices"][0]["message"]
    assert "reasoning_content" not in closed


# Errors, and leaving early


def test_models_are_listed(client: Client) -> None:
    (model,) = client.ask("models", {})
    assert (model["id"], model["object"]) == (MODEL, "model")
    assert client.ask("model", {"model": MODEL})["id"] == MODEL
    assert failure(client.ask("model", {"model": "gpt-5"})).error == "NotFoundError"


@pytest.mark.parametrize("what", ["chat", "completions"])
def test_a_model_that_is_not_served_is_not_found(client: Client, what: str) -> None:
    body = {**(chat("a") if what == "chat" else text("a")), "model": "gpt-5"}
    error = failure(client.ask(what, body))
    assert (error.error, error.status, error.code) == ("NotFoundError", 404, "model_not_found")
    assert "gpt-5" in error.message


def test_a_wrong_key_is_an_authentication_error(client: Client) -> None:
    error = failure(client.ask("chat", chat("a"), api_key="guessed"))
    assert (error.error, error.status, error.code) == ("AuthenticationError", 401, "invalid_api_key")
    assert failure(client.ask("models", {}, api_key="guessed")).error == "AuthenticationError"


@pytest.mark.parametrize(
    ("what", "field", "value", "param", "code"),
    [
        ("chat", "temperature", 9, "temperature", "invalid_value"),
        ("chat", "max_tokens", "many", "max_tokens", "invalid_value"),
        ("chat", "messages", [], "messages", "invalid_value"),
        ("chat", "messages", [{"role": "user", "content": "ü" * 600}], "messages", "context_length_exceeded"),
        ("chat", "n", 0, "n", "invalid_value"),
        ("chat", "top_logprobs", 2, "top_logprobs", None),
        ("chat", "tool_choice", "required", "tool_choice", None),
        ("chat", "response_format", {"type": "xml"}, "response_format.type", "invalid_value"),
        ("completions", "prompt", "", "prompt", "invalid_value"),
        ("completions", "prompt", [1, 99999], "prompt", "invalid_token_id"),
        ("completions", "best_of", 0, "best_of", "invalid_value"),
        ("completions", "stop", ["a"] * 99, "stop", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_value_is_a_bad_request_that_names_the_field(
    client: Client, what: str, field: str, value: Any, param: str, code: str | None, stream: bool
) -> None:
    body = {**(chat("a") if what == "chat" else text("a")), field: value, "stream": stream}
    error = failure(client.ask(what, body))
    assert (error.error, error.status, error.param, error.code) == ("BadRequestError", 400, param, code)
    assert param.split(".")[0] in error.message


def test_past_the_queue_is_a_rate_limit(server: Serving, client: Client) -> None:
    first = client.open("completions", text("a", n=9, max_tokens=900))  # four run, the others wait
    assert first[0]["choices"]
    error = failure(client.ask("chat", chat("a")))
    client.close()
    assert (error.error, error.status, error.code) == ("RateLimitError", 429, "rate_limit_exceeded")
    assert int(error.retry or "0") >= 1
    until(lambda: server.blocks_used() == 0)
    assert content(client.ask("chat", chat("a")))


def aborted(server: Serving) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith('afd_request_success_total{finished_reason="abort"}')]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


@pytest.mark.parametrize("what", ["chat", "completions"])
def test_a_stream_that_is_aborted_frees_its_blocks_at_once(server: Serving, client: Client, what: str) -> None:
    until(lambda: server.blocks_used() == 0)
    before = aborted(server)
    client.open(what, {**(chat("a") if what == "chat" else text("a")), "max_tokens": 900, "n": 4})
    assert server.blocks_used() > 0
    client.close()
    until(lambda: server.blocks_used() == 0, seconds=2.0)
    assert aborted(server) == before + 4
    assert content(client.ask("chat", chat("a")))


def test_a_client_whose_patience_ends_frees_its_blocks(server: Serving, client: Client) -> None:
    before = aborted(server)
    error = client.ask("chat", chat("a", max_tokens=900, n=4), timeout_s=0.3)
    assert failure(error).error == "APITimeoutError"
    until(lambda: server.blocks_used() == 0 and aborted(server) == before + 4, seconds=2.0)


def test_a_deadline_that_passes_is_an_error_of_the_request(client: Client) -> None:
    late = chat("a", max_tokens=900, n=4, timeout=0.2)
    error = failure(client.ask("chat", late))
    assert (error.error, error.status, error.code) == ("InternalServerError", 504, "timeout")
    cut = failure(client.ask("chat", {**late, "stream": True}))
    assert cut.error == "APIError"
    assert "0.2 s" in cut.message
    assert len(cut.partial or []) > 4


def test_both_clients_are_official_and_pinned() -> None:
    lock = json.loads(Path(__file__).with_name("node").joinpath("package-lock.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert list(packages) == ["node_modules/openai"]
    assert "resolved" not in packages["node_modules/openai"]
