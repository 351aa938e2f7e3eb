"""What clients get, over real HTTP and a real gRPC stream, from a scripted engine."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace

import pytest
from openai import AsyncOpenAI
from scripted_worker import endless

from afd.types import GenerateOutput, SampledToken

PROMPT = "the capital of France"
SAID = "Paris is the city of light"
CHAT = [{"role": "user", "content": PROMPT}]


def ids(tokenizer, text):
    return tokenizer.encode(text, special=False)


def events(response):
    """Parsed data lines of a stream; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", f"the stream ended with {lines[-1]}"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_completion_has_the_shape_of_openai(router, worker, tokenizer):
    answer = router.openai.chat.completions.create(model="tiny", messages=CHAT)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", SAID)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    rendered = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    request = worker.submitted.get(timeout=5)
    assert list(request.prompt_token_ids) == ids(tokenizer, rendered)
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)
    usage = answer.usage
    assert usage.prompt_tokens == len(request.prompt_token_ids)
    assert usage.completion_tokens == len(ids(tokenizer, SAID))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_streamed_chat_says_the_same_piece_by_piece(router, tokenizer):
    stream = router.openai.chat.completions.create(
        model="tiny", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == SAID
    assert len(chunks) > 5, "the answer must come in pieces"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(ids(tokenizer, SAID))


def test_without_include_usage_no_chunk_carries_usage(router):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "stream": True}
    assert not any("usage" in chunk for chunk in events(router.http.post("/v1/completions", json=body)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_ends_after_16_tokens_unless_told_otherwise(router, worker, tokenizer, say, stream):
    long = "0123456789 0123456789 0123456789"
    worker.script = say(long)
    answer = router.openai.completions.create(model="tiny", prompt=PROMPT, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == tokenizer.decode(ids(tokenizer, long)[:16])
    assert choices[-1].finish_reason == "length"
    assert worker.submitted.get(timeout=5).sampling.max_tokens == 16


def test_prompts_as_texts_and_as_token_ids_reach_the_worker_alike(router, worker, tokenizer):
    tokens = ids(tokenizer, PROMPT)
    for prompt in (PROMPT, tokens, [PROMPT], [tokens]):
        router.openai.completions.create(model="tiny", prompt=prompt)
        assert list(worker.submitted.get(timeout=5).prompt_token_ids) == tokens


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts_are_ordered_by_prompt_then_choice(router, worker, tokenizer, stream):
    worker.script = echo
    answer = router.openai.completions.create(model="tiny", prompt=["a", "b", "c"], n=2, max_tokens=1, stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    assert {choice.index: choice.text for choice in choices} == dict(enumerate("aabbcc"))
    if not stream:
        assert [choice.index for choice in choices] == [0, 1, 2, 3, 4, 5]
        assert answer.usage.prompt_tokens == 3
        assert answer.usage.completion_tokens == 6


async def echo(request):
    yield GenerateOutput(request.request_id, (SampledToken(request.prompt_token_ids[0]),), "length")


def test_the_choices_of_a_seeded_request_have_seeds_in_a_row(router, worker):
    router.openai.chat.completions.create(model="tiny", messages=CHAT, n=3, seed=2**63 - 1)
    assert sorted(worker.submitted.get(timeout=5).sampling.seed for _ in range(3)) == [2**63 - 1, 2**63, 2**63 + 1]


def test_every_sampling_field_reaches_the_worker(router, worker):
    fields = {
        "max_tokens": 20,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "seed": -1,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.75,
        "ignore_eos": True,
        "stop_token_ids": [5, 6],
    }
    router.http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, **fields}).raise_for_status()
    sampling = worker.submitted.get(timeout=5).sampling
    wanted = {**fields, "seed": 2**64 - 1, "stop_token_ids": (5, 6)}
    assert {name: getattr(sampling, name) for name in fields} == wanted
    assert sampling.logprobs is None


def test_the_models_generation_config_gives_the_defaults(start, settings, worker):
    config = {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "repetition_penalty": 1.25}
    router = start(replace(settings, generation_config=config), worker)
    router.openai.completions.create(model="tiny", prompt=PROMPT)
    sampling = worker.submitted.get(timeout=5).sampling
    assert {name: getattr(sampling, name) for name in config} == config
    router.http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "temperature": 0, "top_k": -1})
    sampling = worker.submitted.get(timeout=5).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0, 0, 0.75)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_token_borders_ends_the_answer_and_is_told_to_the_worker(router, worker, stream):
    body = {"model": "tiny", "messages": CHAT, "stop": ["the city", "zzz"], "stream": stream}
    response = router.http.post("/v1/chat/completions", json=body)
    if stream:
        choices = [choice for chunk in events(response) for choice in chunk["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
    else:
        choices = response.json()["choices"]
        text = choices[0]["message"]["content"]
    assert text == "Paris is "
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "the city")


def test_a_matched_stop_string_cancels_the_rest_at_the_worker(router, worker):
    worker.script = endless
    answer = router.openai.completions.create(model="tiny", prompt="a", stop="aaa", max_tokens=200)
    assert answer.choices[0].text == ""
    assert worker.cancelled.get(timeout=5) == worker.submitted.get(timeout=5).request_id


def test_stop_strings_wait_for_min_tokens(router, worker):
    worker.script = endless
    body = {"model": "tiny", "prompt": "a", "stop": "a", "min_tokens": 3, "max_tokens": 200}
    assert router.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "aaa"


def test_a_stop_token_of_the_request_is_reported_and_eos_is_not(router, worker, say, tokenizer):
    [x] = ids(tokenizer, "x")
    worker.script = say("yes x", stop_token_id=x)
    body = {"model": "tiny", "prompt": PROMPT, "stop_token_ids": [x], "return_token_ids": True}
    choice = router.http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("yes ", "stop", x)
    assert choice["token_ids"] == ids(tokenizer, "yes x")
    [eos] = ids(tokenizer, "<|im_end|>")
    worker.script = say("yes<|im_end|>", stop_token_id=eos)
    choice = router.http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("yes", "stop", None)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "Paris is "),
        ({"include_stop_str_in_output": True}, "Paris is the"),
        ({"stop": None}, "Paris is the city"),
        ({"stop": None, "skip_special_tokens": False}, "Paris<|im_start|> is the city"),
        ({"stop": None, "include_stop_str_in_output": True}, "Paris is the city"),
        (
            {"stop": None, "include_stop_str_in_output": True, "skip_special_tokens": False},
            "Paris<|im_start|> is the city<|im_end|>",
        ),
    ],
)
def test_special_tokens_and_what_stopped_the_answer_are_shown_on_request(router, worker, say, tokenizer, fields, text):
    [eos] = ids(tokenizer, "<|im_end|>")
    worker.script = say("Paris<|im_start|> is the city<|im_end|>", stop_token_id=eos)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "stop": "the", **fields}
    assert router.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == text


def test_a_chat_may_leave_the_assistants_turn_closed_and_set_template_variables(start, settings, worker, tokenizer):
    template = "{{ messages[0]['content'] }}{{ mood }}{% if add_generation_prompt %}:{% endif %}"
    router = start(replace(settings, tokenizer_config={"chat_template": template}), worker)
    body = {"model": "tiny", "messages": CHAT, "add_special_tokens": False}
    for fields, text in (
        ({}, f"{PROMPT}:"),
        ({"add_generation_prompt": False}, PROMPT),
        ({"chat_template_kwargs": {"mood": "!"}}, f"{PROMPT}!:"),
    ):
        router.http.post("/v1/chat/completions", json={**body, **fields}).raise_for_status()
        assert list(worker.submitted.get(timeout=5).prompt_token_ids) == ids(tokenizer, text)


def test_a_prompt_of_many_texts_is_encoded_in_one_go_on_another_thread(router, monkeypatch):
    tokenizer, threads = router.gateway._relay.jobs.tokenizer, []
    encode = tokenizer.encode

    def spy(text, **kwargs):
        threads.append(threading.get_ident())
        return encode(text, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", spy)
    body = {"model": "tiny", "prompt": ["the capital of France " * 8] * 100, "max_tokens": 1}
    assert router.http.post("/v1/completions", json=body).status_code == 200
    assert len(threads) == 100
    assert len(set(threads)) == 1
    assert router._thread.ident not in threads


def test_special_tokens_around_a_prompt_are_the_clients_choice(router, monkeypatch):
    tokenizer, asked = router.gateway._relay.jobs.tokenizer, []
    encode = tokenizer.encode

    def spy(text, *, special):
        asked.append(special)
        return encode(text, special=special)

    monkeypatch.setattr(tokenizer, "encode", spy)
    for path, prompt in (("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": CHAT})):
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            router.http.post(f"/v1/{path}", json={"model": "tiny", **prompt, **fields}).raise_for_status()
    assert asked == [True, True, False, False, True, False]


@pytest.mark.parametrize("stream", [False, True])
def test_characters_split_over_tokens_arrive_whole(router, worker, say, stream):
    text = "naïve 日本 👩‍👩‍👧 ok"
    worker.script = say(text)
    answer = router.openai.chat.completions.create(model="tiny", messages=CHAT, stream=stream)
    pieces = [c.choices[0].delta.content or "" for c in answer] if stream else [answer.choices[0].message.content]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_by_the_limit_is_shown_as_one_that_is_missing(router, worker, say, tokenizer):
    worker.script = say("ab日")
    answer = router.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=4)
    assert answer.choices[0].text == tokenizer.decode(ids(tokenizer, "ab日")[:4]) == "ab\ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_token_bytes_and_alternatives(router, worker, say, tokenizer, stream):
    worker.script = say("é ok")
    answer = router.openai.chat.completions.create(
        model="tiny", messages=CHAT, logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "é ok"
    assert len(content) == len(ids(tokenizer, "é ok"))
    assert content[0].logprob == -0.5
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert content[0].top_logprobs[0].bytes == content[0].bytes == [0xC3]


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_are_parallel_lists(router, tokenizer, stream):
    answer = router.openai.completions.create(model="tiny", prompt=PROMPT, logprobs=1, max_tokens=5, stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    parts = [choice.logprobs for choice in choices]
    tokens = [token for part in parts for token in part.tokens]
    text = "".join(choice.text for choice in choices)
    assert "".join(tokens) == text
    assert [o for part in parts for o in part.text_offset] == [len("".join(tokens[:i])) for i in range(5)]
    assert [value for part in parts for value in part.token_logprobs] == [-0.5] * 5
    assert [top for part in parts for top in part.top_logprobs] == [{token: -0.5} for token in tokens]


def test_token_ids_come_back_when_asked_for(router, tokenizer):
    body = {"model": "tiny", "messages": CHAT, "return_token_ids": True}
    answer = router.http.post("/v1/chat/completions", json=body).json()
    prompt_ids = ids(tokenizer, f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
    assert answer["prompt_token_ids"] == prompt_ids
    assert answer["choices"][0]["token_ids"] == ids(tokenizer, SAID)
    chunks = events(router.http.post("/v1/chat/completions", json={**body, "stream": True}))
    assert chunks[0]["prompt_token_ids"] == prompt_ids
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == ids(tokenizer, SAID)
    body = {"model": "tiny", "prompt": PROMPT, "return_token_ids": True, "max_tokens": 64}
    choice = router.http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids(tokenizer, PROMPT), ids(tokenizer, SAID))
    chunks = events(router.http.post("/v1/completions", json={**body, "stream": True}))
    assert chunks[0]["choices"][0]["prompt_token_ids"] == ids(tokenizer, PROMPT)
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == ids(tokenizer, SAID)


def test_sixty_four_streams_at_once_each_get_their_own_answer(router, worker):
    worker.script = repeat_prompt

    async def ask(client, text):
        stream = await client.completions.create(model="tiny", prompt=text, max_tokens=64, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all(texts):
        async with AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text) for text in texts))

    texts = [f"stream number {i}" for i in range(64)]
    assert asyncio.run(ask_all(texts)) == texts


async def repeat_prompt(request):
    for position, token in enumerate(request.prompt_token_ids):
        last = position == len(request.prompt_token_ids) - 1
        yield GenerateOutput(request.request_id, (SampledToken(token),), "length" if last else None)


def test_models_are_listed_with_their_context(router):
    [model] = router.openai.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 256)
    assert router.openai.models.retrieve("tiny").id == "tiny"


def test_status_tells_the_cluster_and_what_each_worker_holds(router, worker):
    status = router.http.get("/status").json()
    assert (status["epoch"], status["model"], status["problem"]) == (7, "tiny", "")
    [entry] = status["workers"]
    assert (entry["role"], entry["rank"], entry["state"], entry["address"]) == ("attention", 0, "ready", worker.address)
    assert (entry["status"]["blocks_used"], entry["status"]["blocks_total"]) == (3, 64)


def test_metrics_count_tokens_requests_and_kv_blocks(router, tokenizer):
    router.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=64)
    text = router.http.get("/metrics").text
    for line in (
        f"afd_prompt_tokens_total {len(ids(tokenizer, PROMPT))}.0",
        f"afd_generation_tokens_total {len(ids(tokenizer, SAID))}.0",
        'afd_request_success_total{finished_reason="stop"} 1.0',
        "afd_time_to_first_token_seconds_count 1.0",
        f"afd_inter_token_latency_seconds_count {len(ids(tokenizer, SAID)) - 1}.0",
        "afd_e2e_request_latency_seconds_count 1.0",
        'afd_kv_blocks_used{attention_rank="0"} 3.0',
        'afd_requests_waiting{attention_rank="0"} 2.0',
    ):
        assert line in text.splitlines(), line
