"""Fields beyond plain sampling: biases and masks, best_of, echo, and how prompts are cut and continued."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from afd.types import GenerateOutput, SampledToken

PROMPT = "the capital of France"
SAID = "Paris is the city of light"
CHAT = [{"role": "user", "content": PROMPT}]


def ids(tokenizer, text):
    return tokenizer.encode(text, special=False)


def ask(router, path="completions", **fields):
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": CHAT}
    response = router.http.post(f"/v1/{path}", json={"model": "tiny", **prompt, **fields})
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return response.json()
    *chunks, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_biases_and_masks_reach_the_worker_as_token_ids(router, worker, tokenizer, path):
    ask(router, path, logit_bias={"7": -100, "5": 1.5}, allowed_token_ids=[9, 4], bad_words=["Paris", " of light"])
    sampling = worker.submitted.get(timeout=5).sampling
    assert sampling.logit_bias == ((5, 1.5), (7, -100.0))
    assert sampling.allowed_token_ids == (9, 4)
    assert tuple(ids(tokenizer, "Paris")) in sampling.bad_words
    assert tuple(ids(tokenizer, "of light")) in sampling.bad_words


def test_a_bad_word_is_meant_at_the_beginning_and_after_a_space(tokenizer):
    for word in ("city", "Paris"):
        spellings = tokenizer.spellings([word])
        assert tuple(ids(tokenizer, word)) in spellings
        follows = tuple(ids(tokenizer, f"x {word}"))
        assert any(follows[-len(spelling) :] == spelling for spelling in spellings)


async def luck(request):
    """The choice's number says how likely its two tokens are; the second is the likeliest."""
    number = int(request.request_id.rsplit("-", 1)[1])
    logprob = -1.0 if number % 3 == 1 else -2.0 - number
    token = request.prompt_token_ids[0] + number
    logprobs = logprob if request.sampling.logprobs is not None else None
    yield GenerateOutput(request.request_id, (SampledToken(token, logprobs),))
    yield GenerateOutput(request.request_id, (SampledToken(token, logprobs),), "length")


def test_best_of_gives_the_likeliest_of_each_prompt_and_counts_all(router, worker, tokenizer):
    worker.script = luck
    [first, second] = ids(tokenizer, "a") + ids(tokenizer, "s")
    answer = ask(router, prompt=["a", "s"], n=2, best_of=3, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"][0] for choice in answer["choices"]] == [first + 1, first, second + 4, second + 3]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[first]] * 2 + [[second]] * 2
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 12


def test_best_of_that_keeps_all_asks_the_worker_for_no_logprobs(router, worker):
    ask(router, n=2, best_of=2)
    assert worker.submitted.get(timeout=5).sampling.logprobs is None
    ask(router, n=1, best_of=2)
    assert worker.submitted.get(timeout=5).sampling.logprobs is None  # the other choice of the first request
    assert worker.submitted.get(timeout=5).sampling.logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_each_answer(router, tokenizer, stream):
    for prompt in (PROMPT, ids(tokenizer, PROMPT)):
        answer = ask(router, prompt=[prompt], echo=True, n=2, max_tokens=64, stream=stream)
        choices = [c for chunk in answer for c in chunk["choices"]] if stream else answer["choices"]
        for index in (0, 1):
            assert "".join(c["text"] for c in choices if c["index"] == index) == PROMPT + SAID


async def scored(request):
    """A script: the prompt's logprobs with the first of two tokens, which are the prompt's last."""
    one = [SampledToken(i, -0.25, ((i, -0.25), (3, -2.0))) for i in request.prompt_token_ids]
    prompt = (SampledToken(one[0].token_id), *one[1:]) if request.sampling.prompt_logprobs else ()
    yield GenerateOutput(request.request_id, (one[-1],), prompt=prompt)
    yield GenerateOutput(request.request_id, (one[-1],), "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, "é", "a\U0001f600b"])
def test_echo_with_logprobs_gives_the_prompts_too(router, worker, tokenizer, stream, prompt):
    worker.script = scored
    answer = ask(router, prompt=prompt, echo=True, logprobs=2, max_tokens=2, stream=stream)
    choices = [c for chunk in answer for c in chunk["choices"]] if stream else answer["choices"]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    found = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    text, wanted = "".join(choice["text"] for choice in choices), ids(tokenizer, prompt)
    assert text.startswith(prompt)
    assert found["token_logprobs"] == [None, *[-0.25] * (len(wanted) + 1)]
    assert found["top_logprobs"][0] is None
    assert all(len(top) in (1, 2) for top in found["top_logprobs"][1:])
    spelled = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in [*wanted, wanted[-1], wanted[-1]]]
    assert found["tokens"] == spelled
    starts = found["text_offset"]
    assert starts == sorted(starts)
    assert starts[len(wanted)] == len(prompt)
    if prompt == PROMPT:
        assert starts == [len("".join(spelled[:i])) for i in range(len(spelled))]
    ask(router, prompt=prompt, logprobs=2)
    asked = [worker.submitted.get(timeout=5).sampling for _ in range(2)]
    assert [sampling.prompt_logprobs for sampling in asked] == [True, False]


@pytest.mark.parametrize(("wanted", "kept"), [(3, 3), (1000, None), (-1, None)])
def test_a_prompt_is_cut_to_its_last_tokens(router, worker, tokenizer, wanted, kept):
    whole = ids(tokenizer, PROMPT)
    ask(router, truncate_prompt_tokens=wanted)
    assert list(worker.submitted.get(timeout=5).prompt_token_ids) == whole[-(kept or len(whole)) :]


def test_a_prompt_may_be_cut_to_what_there_is_room_for(router, worker):
    ask(router, prompt=list(range(3, 303)), truncate_prompt_tokens=-1, max_tokens=56)
    assert list(worker.submitted.get(timeout=5).prompt_token_ids) == list(range(103, 303))


def test_the_last_message_may_be_continued(router, worker, tokenizer):
    messages = [*CHAT, {"role": "assistant", "content": "Paris is "}]
    ask(router, "chat/completions", messages=messages, continue_final_message=True)
    prompt = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\nParis is "
    assert list(worker.submitted.get(timeout=5).prompt_token_ids) == ids(tokenizer, prompt)


def test_a_template_that_hides_the_last_message_cannot_continue_it(start, settings, worker):
    template = "{{ messages[0]['content'] }}"
    router = start(replace(settings, tokenizer_config={"chat_template": template}), worker)
    body = {"model": "tiny", "messages": [*CHAT, {"role": "assistant", "content": "P"}], "continue_final_message": True}
    error = router.http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "continue_final_message"


def test_a_trusted_request_may_bring_its_own_template(start, settings, worker, tokenizer):
    router = start(replace(settings, trust_request_chat_template=True), worker)
    ask(router, "chat/completions", chat_template="Q: {{ messages[0]['content'] }} A:")
    assert list(worker.submitted.get(timeout=5).prompt_token_ids) == ids(tokenizer, f"Q: {PROMPT} A:")
    body = {"model": "tiny", "messages": CHAT, "chat_template": "{% if %}"}
    response = router.http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")


def test_logprobs_may_name_tokens_by_id(router, tokenizer):
    wanted = [f"token_id:{i}" for i in ids(tokenizer, SAID)]
    fields = {"return_tokens_as_token_ids": True, "max_tokens": 64}
    logprobs = ask(router, logprobs=1, **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == wanted
    assert list(logprobs["top_logprobs"][0]) == wanted[:1]
    content = ask(router, "chat/completions", logprobs=True, top_logprobs=1, **fields)["choices"][0]["logprobs"]
    assert [entry["token"] for entry in content["content"]] == wanted
    assert content["content"][0]["top_logprobs"][0]["token"] == wanted[0]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_every_chunk_may_say_what_was_generated_so_far(router, tokenizer, path):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = ask(router, path, stream=True, stream_options=options, max_tokens=64)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    num_tokens = len(ids(tokenizer, SAID))
    assert counts[-num_tokens - 1 :] == [*range(1, num_tokens + 1), num_tokens]
    assert set(counts[: -num_tokens - 1]) <= {0}
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_answers_carry_the_fingerprint_of_the_deployment(start, settings, worker, path):
    router = start(replace(settings, fingerprint="fp_123"), worker)
    assert ask(router, path)["system_fingerprint"] == "fp_123"
    assert {chunk["system_fingerprint"] for chunk in ask(router, path, stream=True)} == {"fp_123"}


def test_echo_of_a_cut_prompt_is_what_the_model_saw(router, tokenizer):
    kept = tokenizer.decode(ids(tokenizer, PROMPT)[-2:], special=True)
    assert kept != PROMPT
    answer = ask(router, prompt=PROMPT, echo=True, truncate_prompt_tokens=2, max_tokens=64)
    assert answer["choices"][0]["text"] == kept + SAID
