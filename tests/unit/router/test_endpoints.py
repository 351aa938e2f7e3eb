"""What is served beside generation: the tokenizer, version and readiness, and the OpenAPI document."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted_worker import cluster

PROMPT = "the capital of France"
CHAT = [{"role": "user", "content": PROMPT}]
RENDERED = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"


def test_a_text_is_tokenized_and_comes_back(router, tokenizer):
    wanted = tokenizer.encode(PROMPT, special=True)
    answer = router.http.post("/tokenize", json={"model": "tiny", "prompt": PROMPT}).json()
    assert answer == {"count": len(wanted), "max_model_len": 256, "tokens": wanted, "token_strs": None}
    assert router.http.post("/detokenize", json={"tokens": wanted}).json() == {"prompt": PROMPT}
    empty = router.http.post("/tokenize", json={"prompt": ""}).json()
    assert (empty["count"], empty["tokens"]) == (0, [])


def test_messages_are_tokenized_as_a_chat_would_be(router, worker):
    body = {"model": "tiny", "messages": CHAT}
    answer = router.http.post("/tokenize", json={**body, "return_token_strs": True}).json()
    router.http.post("/v1/chat/completions", json=body).raise_for_status()
    assert answer["tokens"] == list(worker.submitted.get(timeout=5).prompt_token_ids)
    assert answer["token_strs"][0] == "<|im_start|>"
    assert router.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"] == RENDERED
    open_ended = router.http.post("/tokenize", json={**body, "add_generation_prompt": False}).json()
    assert open_ended["count"] < answer["count"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("tokenize", {}, 400, "prompt"),
        ("tokenize", {"prompt": 5}, 400, "prompt"),
        ("tokenize", {"messages": []}, 400, "messages"),
        ("tokenize", {"prompt": "a", "model": "gpt-9"}, 404, "model"),
        ("tokenize", {"messages": CHAT, "chat_template": "x"}, 400, "chat_template"),
        ("detokenize", {}, 400, "tokens"),
        ("detokenize", {"tokens": [512]}, 400, "tokens"),
        ("detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("detokenize", [1], 400, None),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_field(router, path, body, status, param):
    response = router.http.post(f"/{path}", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_version_and_readiness(router, worker):
    assert set(router.http.get("/version").json()) == {"version"}
    assert router.http.get("/ready").status_code == 200
    worker.die()
    router.view = cluster(worker.view("lost", "attention worker 0 is gone"))
    for _ in range(500):
        response = router.http.get("/ready")
        if response.status_code == 503 and "is gone" in response.text:
            break
    else:
        pytest.fail("/ready never told that no worker is left")


def test_the_document_describes_every_route_its_body_and_its_errors(router):
    document = router.http.get("/openapi.json").json()
    paths = document["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/ready", "/metrics"} <= set(paths)
    schemas = document["components"]["schemas"]
    for path, name in (("/v1/chat/completions", "ChatRequest"), ("/v1/completions", "CompletionRequest")):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert schemas[name]["properties"]["model"]["enum"] == ["tiny"]
        assert "from when the request is sent to a worker" in schemas[name]["properties"]["timeout"]["description"]
        assert "text/event-stream" in paths[path]["post"]["responses"]["200"]["content"]
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            error = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert error == {"$ref": "#/components/schemas/Error"}
    assert "securitySchemes" not in document["components"]


def test_the_document_says_which_routes_want_a_key(start, settings, worker):
    router = start(replace(settings, api_keys=("s3cret",)), worker)
    assert router.http.get("/openapi.json").status_code == 401
    document = router.http.get("/openapi.json", headers={"Authorization": "Bearer s3cret"}).json()
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_is_served_that_loads_its_parts_from_elsewhere(router, path):
    assert router.http.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_load_balancers_may_ask_with_head(router, path):
    asked = router.http.get(path)
    response = router.http.head(path)
    assert (response.status_code, response.content) == (asked.status_code, b"")
    assert response.headers["content-length"] == asked.headers["content-length"]
    assert "head" not in router.http.get("/openapi.json").json()["paths"].get(path, {})


def test_what_asks_for_nothing_is_taken(router):
    messages = [*CHAT, {"role": "assistant", "content": None}, *CHAT]
    body = {"model": "tiny", "messages": messages, "logprobs": False, "top_logprobs": 0}
    assert router.http.post("/v1/chat/completions", json=body).status_code == 200
