"""Every way to be refused: status, type, param and code, and the server goes on."""

from __future__ import annotations

import logging
from dataclasses import replace

import openai
import pytest
from scripted_worker import ScriptedWorker, refuse

CHAT = [{"role": "user", "content": "hi"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name):
    return {"type": "function", "function": {"name": name}}


def call(arguments):
    """An assistant's message that calls a tool."""
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


def refused(response, status, param, *words):
    """Checks the shape and gives the error's code."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    for word in words:
        assert word in error["message"], error["message"]
    return error["code"]


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": 2.5}, "temperature", "2.5"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": True}, "temperature", "True"),
        ({"top_p": 0}, "top_p", "0"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"min_p": 2}, "min_p", "2"),
        ({"n": 0}, "n", "0"),
        ({"n": 1000}, "n", "128"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": "5"}, "max_tokens", "'5'"),
        ({"max_tokens": 1.5}, "max_tokens", "1.5"),
        ({"min_tokens": -1}, "min_tokens", "-1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "8"),
        ({"frequency_penalty": 3}, "frequency_penalty", "3"),
        ({"presence_penalty": -3}, "presence_penalty", "-3"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"seed": 1.5}, "seed", "1.5"),
        ({"seed": 2**63}, "seed", "9223372036854775808"),
        ({"stop": 5}, "stop", "list of strings"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "'a'"),
        ({"stop_token_ids": [512]}, "stop_token_ids", "511"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": "yes"}},
            "stream_options.continuous_usage_stats",
            "'yes'",
        ),
        ({"model": 5}, "model", "5"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens", "'no'"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "101"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "'five'"),
        ({"logit_bias": {"512": 1}}, "logit_bias", "511"),
        ({"logit_bias": [5]}, "logit_bias", "dictionary"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
        ({"allowed_token_ids": [512]}, "allowed_token_ids", "511"),
        ({"bad_words": [""]}, "bad_words[0]", "1 character"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-2"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_json": {"type": "objec"}}, "guided_json", "objec"),
        ({"structured_outputs": {}}, "structured_outputs", "asks for nothing"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"grammar": "begin: x"}}, "structured_outputs.grammar", "start"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one grammar only"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "Unimplemented",
        ),
        ({"guided_regex": "a" * 200_000}, "guided_regex", "131072"),
    ],
)
def test_a_bad_field_is_named_by_both_endpoints(router, fields, param, word):
    refused(router.http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", **fields}), 400, param, word)
    refused(
        router.http.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT, **fields}), 400, param, word
    )


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": 7}, "prompt", "string"),
        ({"prompt": {"a": 1}}, "prompt", "string"),
        ({"prompt": ["a", 1]}, "prompt", "string"),
        ({"prompt": [True]}, "prompt", "string"),
        ({"prompt": [512]}, "prompt", "512"),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"logprobs": True}, "logprobs", "True"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"chat_template": "x"}, "chat_template", "not supported"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2, "n": 3}, "best_of", "3"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of", "not streamed"),
        ({"prompt": ["a"] * 513, "best_of": 2}, "prompt", "1024"),
        ({"prompt": ["a"] * 513, "n": 2}, "prompt", "1024"),
    ],
)
def test_a_bad_field_of_completions_is_named(router, fields, param, word):
    refused(router.http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", **fields}), 400, param, word)


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "wizard"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": IMAGE}, "messages[0].content", "image_url"),
        ({"messages": [{**CHAT[0], "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function", "missing"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing"),
        ({"messages": [call("{")]}, "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": [call("[]")]}, "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"tools": [{}]}, "tools[0].type", "missing"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "characters"),
        ({"tools": [tool("f"), tool("f")]}, "tools", "'f'"),
        ({"tools": [tool("f")], "tool_choice": "maybe"}, "tool_choice", "required"),
        ({"tools": [tool("f")], "tool_choice": named("g")}, "tool_choice", "'g'"),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tools": [tool("f", {"type": "objec"})], "tool_choice": "required"}, "tools", "objec"),
        ({"logprobs": 3}, "logprobs", "3"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs", "logprobs: true"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "0"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "dictionary"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "both"),
        ({"chat_template": "x"}, "chat_template", "router.trust_request_chat_template"),
        ({"best_of": 3}, "best_of", "not supported"),
    ],
)
def test_a_bad_field_of_chat_is_named(router, fields, param, word):
    refused(
        router.http.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT, **fields}), 400, param, word
    )


def test_fields_that_ask_for_nothing_are_accepted(router):
    nothing = {"user": "me", "metadata": {}, "tools": [], "tool_choice": "auto", "logit_bias": None, "stop": None}
    more = {"response_format": {"type": "text"}, "best_of": 2, "n": 2, "echo": False, "suffix": None, "seed": None}
    body = {"model": "tiny", "prompt": "hi", **nothing, **more}
    assert router.http.post("/v1/completions", json=body).status_code == 200
    history = [*CHAT, {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": None}, *CHAT]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}]
    body = {"model": "tiny", "messages": parts + history, "logprobs": False}
    assert router.http.post("/v1/chat/completions", json=body).status_code == 200


def test_switches_of_vllm_that_are_off_are_accepted_by_both_endpoints(router):
    switches = {
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "echo": False,
        "truncate_prompt_tokens": None,
        "request_id": "mine",
        "stream": True,
        "stream_options": {"include_obfuscation": False, "continuous_usage_stats": False},
    }
    for path, body in (("completions", {"prompt": "hi"}), ("chat/completions", {"messages": CHAT})):
        response = router.http.post(f"/v1/{path}", json={"model": "tiny", **body, **switches})
        assert response.status_code == 200, response.text


def test_a_field_that_nobody_knows_is_dropped_with_a_line_in_the_debug_log(router, caplog):
    with caplog.at_level(logging.DEBUG, "router.openai.bodies"):
        body = {"model": "tiny", "prompt": "hi", "frobnicate": {"a": 1}}
        assert router.http.post("/v1/completions", json=body).status_code == 200
    assert "'frobnicate'" in caplog.text


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[1]", b'"text"', b'{"prompt": NaN}'])
def test_a_body_that_is_no_json_object_is_refused_and_the_server_goes_on(router, raw):
    response = router.http.post("/v1/completions", content=raw)
    assert refused(response, 400, None, "body") == "invalid_json"
    assert router.openai.completions.create(model="tiny", prompt="hi").choices[0].text


@pytest.mark.parametrize("where", ["logit_bias", "tools", "guided_json", "arguments"])
def test_nesting_without_end_is_refused_wherever_json_is_read(router, where):
    for depth in (100, 140, 1000):
        deep = "[" * depth + "]" * depth
        text = f'"{{\\"a\\": {deep}}}"'  # JSON in JSON
        fields = {
            "logit_bias": f'"logit_bias": {deep}',
            "tools": f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {{"a": {deep}}}}}}}]',
            "guided_json": f'"guided_json": {text}',
            "arguments": f'"messages": [{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", '
            f'"arguments": {text}}}}}]}}]',
        }
        messages = "" if where == "arguments" else '"messages": [{"role": "user", "content": "hi"}], '
        raw = f'{{"model": "tiny", "max_tokens": 2, {messages}{fields[where]}}}'
        response = router.http.post("/v1/chat/completions", content=raw.encode())
        assert response.status_code in (200, 400), response.text
        assert ("128 deep" in response.text) == (depth > 128), response.text


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(router, missing):
    body = {name: "tiny" for name in ("model", "prompt") if name != missing}
    assert refused(router.http.post("/v1/completions", json=body), 400, missing) == "missing_required_parameter"


def test_an_unknown_model_is_not_found_and_the_served_one_is_named(router):
    with pytest.raises(openai.NotFoundError) as caught:
        router.openai.completions.create(model="gpt-9", prompt="hi")
    assert caught.value.code == "model_not_found"
    assert "tiny" in caught.value.message
    assert refused(router.http.get("/v1/models/gpt-9"), 404, "model", "tiny") == "model_not_found"


def test_more_tokens_than_the_context_are_refused_with_the_lengths(router):
    body = {"model": "tiny", "prompt": [7] * 200, "max_tokens": 57}
    code = refused(router.http.post("/v1/completions", json=body), 400, "prompt", "256", "200", "57")
    assert code == "context_length_exceeded"
    response = router.http.post("/v1/completions", json={**body, "max_tokens": 56})
    assert response.status_code == 200
    body = {"model": "tiny", "messages": [{"role": "user", "content": "0123456789" * 30}]}
    code = refused(router.http.post("/v1/chat/completions", json=body), 400, "messages", "256")
    assert code == "context_length_exceeded"


def test_the_default_length_shrinks_to_the_rest_of_the_context(router, worker):
    assert router.http.post("/v1/completions", json={"model": "tiny", "prompt": [7] * 250}).status_code == 200
    assert worker.submitted.get(timeout=5).sampling.max_tokens == 6


def test_a_worker_with_a_smaller_context_than_the_model_sets_the_limit_of_all(start, settings, worker):
    worker.max_context = 100
    roomy, silent = ScriptedWorker(worker.script, 1), ScriptedWorker(worker.script, 2)
    roomy.max_context = 1000
    router = start(settings, worker, roomy, silent)
    try:
        assert router.openai.models.list().data[0].max_model_len == 100
        body = {"model": "tiny", "prompt": [7] * 90, "max_tokens": 11}
        code = refused(router.http.post("/v1/completions", json=body), 400, "prompt", "100", "90", "11")
        assert code == "context_length_exceeded"
        assert router.http.post("/v1/completions", json={"model": "tiny", "prompt": [7] * 90}).status_code == 200
        took = [request for each in (worker, roomy, silent) for request in each.submitted.queue]
        assert [request.sampling.max_tokens for request in took] == [10]
    finally:
        roomy.die()
        silent.die()


def test_unknown_routes_and_wrong_methods_are_refused_in_the_same_shape(router):
    refused(router.http.get("/v2/nothing"), 404, None, "/v2/nothing")
    refused(router.http.get("/v1/completions"), 405, None, "GET")


def test_a_body_beyond_the_limit_is_refused(start, settings, worker):
    router = start(replace(settings, max_body_bytes=1000), worker)
    response = router.http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 2000})
    assert refused(response, 413, None, "1000") == "body_too_large"


def test_a_model_without_chat_template_sends_the_client_to_completions(start, settings, worker):
    router = start(replace(settings, tokenizer_config={}), worker)
    response = router.http.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT})
    assert refused(response, 400, "messages", "/v1/completions") == "no_chat_template"


def test_what_the_chat_template_raises_is_told(start, settings, worker):
    template = "{{ raise_exception('roles must alternate') }}"
    router = start(replace(settings, tokenizer_config={"chat_template": template}), worker)
    response = router.http.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT})
    assert refused(response, 400, "messages", "roles must alternate") == "chat_template_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_engine_is_the_clients_error(router, worker, stream):
    worker.script = refuse
    response = router.http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "stream": stream})
    refused(response, 400, None, "temperature is odd")


def test_a_bug_is_logged_with_the_request_and_told_as_500_and_the_server_goes_on(router, monkeypatch, caplog):
    jobs = router.gateway._relay.jobs

    async def broken(job_id, body, num_bytes):
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(jobs, "completion", broken)
        response = router.http.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "ZeroDivisionError" in caplog.text
    assert "cmpl-" in caplog.text
    assert router.openai.completions.create(model="tiny", prompt="hi").choices[0].text
