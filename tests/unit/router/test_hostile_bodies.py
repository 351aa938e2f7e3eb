"""Bodies of megabytes that are refused: soon, in little memory, and while others are answered."""

from __future__ import annotations

import resource
import threading
import time

import httpx
import pytest

CHAT = [{"role": "user", "content": "hi"}]
MANY = 500_000
MOST_WAIT_S = 1.0
MOST_GROWTH_BYTES = 256 << 20


def answered_meanwhile(router, path, body):
    """The answer to `body`, and the longest that /version took while it was made, in seconds."""
    waits, begun, done = [], threading.Event(), threading.Event()

    def ask():
        with httpx.Client(base_url=router.url, timeout=15, trust_env=False) as client:
            while not done.is_set():
                began = time.perf_counter()
                begun.set()
                assert client.get("/version").status_code == 200
                waits.append(time.perf_counter() - began)

    asking = threading.Thread(target=ask)
    content = httpx.Request("POST", "http://x", json=body).content  # before the clock runs
    asking.start()
    assert begun.wait(10)
    try:
        response = router.http.post(path, content=content)
    finally:
        done.set()
        asking.join(15)
    return response, max(waits)


@pytest.mark.parametrize(
    ("path", "fields", "param", "word"),
    [
        ("v1/completions", {"stop_token_ids": [-1] * MANY}, "stop_token_ids[0]", "-1"),
        ("v1/completions", {"stop_token_ids": [1] * MANY}, "stop_token_ids", "1024"),
        ("v1/completions", {"allowed_token_ids": [1] * MANY}, "allowed_token_ids", "262144"),
        ("v1/completions", {"bad_words": [""] * MANY}, "bad_words[0]", "1 character"),
        ("v1/completions", {"bad_words": ["a" * 257]}, "bad_words[0]", "256"),
        ("v1/completions", {"stop": "a" * 5000}, "stop", "4096"),
        ("v1/completions", {"prompt": [[1, "a"]] * MANY}, "prompt", "list of token ids"),
        ("v1/completions", {"prompt": [1] * (1 << 21) + [1]}, "prompt", "2097152"),
        ("v1/completions", {"structured_outputs": {f"k{i}": 1 for i in range(MANY)}}, "structured_outputs.k0", "extra"),
        ("v1/completions", {"guided_choice": [1] * MANY}, "guided_choice[0]", "string"),
        ("v1/completions", {"model": "a" * 4_000_000}, "model", "..."),
        ("v1/chat/completions", {"messages": [1] * MANY}, "messages[0]", "Message"),
        ("v1/chat/completions", {"messages": CHAT * (1 << 15)}, "messages", "16384"),
        ("v1/chat/completions", {"messages": CHAT, "tools": [{}] * MANY}, "tools[0].type", "missing"),
        ("v1/chat/completions", {"messages": [{}] * (1 << 22)}, None, "4194304"),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "x" * 4_000_000}]}]},
         "messages[0].content", "only parts of type 'text'"),
        ("detokenize", {"tokens": [-1] * MANY}, "tokens[0]", "-1"),
        ("tokenize", {"messages": [1] * MANY}, "messages[0]", "Message"),
    ],
)  # fmt: skip
def test_a_long_body_is_refused_by_its_first_fault_while_others_are_answered(router, path, fields, param, word):
    prompt = {} if "chat" in path or "tokenize" in path else {"prompt": "hi"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response, longest_s = answered_meanwhile(router, f"/{path}", {"model": "tiny", **prompt, **fields})
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param
    assert word in error["message"]
    assert len(response.content) < 1000
    assert longest_s < MOST_WAIT_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_GROWTH_BYTES


@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions", "tokenize"])
def test_text_that_cannot_fit_is_refused_without_being_tokenized(router, path):
    text = "light " * 1_000_000
    fields = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    response, longest_s = answered_meanwhile(router, f"/{path}", {"model": "tiny", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "bytes of text" in error["message"]
    assert longest_s < MOST_WAIT_S


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "light of Paris " * 60_000, "truncate_prompt_tokens": 8},
        {"prompt": "a", "bad_words": [f"{i:0256}" for i in range(256)]},
        {"messages": [{"role": "user", "content": ""}] * 10_000},
        {"prompt": "a", "guided_json": {"enum": [str(i) for i in range(300_000)]}},
        {"prompt": "a", "guided_choice": ["yes" * 1000] * 1000},
        {"messages": CHAT, "chat_template_kwargs": {f"k{i}": [i] for i in range(100_000)}},
    ],
)
def test_long_work_keeps_nobody_waiting(router, fields):
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    response, longest_s = answered_meanwhile(router, path, {"model": "tiny", **fields})
    assert response.status_code in (200, 400), response.text
    assert longest_s < MOST_WAIT_S


def test_long_text_is_encoded_and_decoded_as_short_text_is(tokenizer):
    text = "the capital of France é " * 1000
    ids = tokenizer.encode(text, special=False)
    assert ids == tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.most_token_bytes == max(len(tokenizer.token_bytes(i)) for i in range(300))
