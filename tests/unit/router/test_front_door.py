"""Keys, origins, request ids, limits on heads, and the line of log that a request leaves."""

from __future__ import annotations

import json
import logging
import socket
import time
from dataclasses import replace

import httpx
import openai
import pytest
from openai import OpenAI
from scripted_worker import endless

from afd.log import JsonFormatter

BODY = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 64}
PAGE = "https://page.example"


def eventually(find, what):
    """The first true thing that `find` gives."""
    end = time.monotonic() + 10
    while not (found := find()):
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.01)
    return found


@pytest.fixture
def keyed(start, settings, worker):
    return start(replace(settings, api_keys=("first-key", "second-key")), worker)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_key_opens_the_door(keyed, key):
    with OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(**BODY).choices[0].text
    assert keyed.http.get("/status", headers={"authorization": f"bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [None, "Bearer", "Bearer first-ke", "Bearer first-key2", "first-key", "Basic first-key", "Bearer é"],
)
def test_without_a_key_nothing_but_probes_is_served(keyed, worker, sent):
    headers = [] if sent is None else [(b"Authorization", sent.encode())]
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/status"), ("POST", "/tokenize")):
        response = keyed.http.request(method, path, headers=headers, json=BODY if method == "POST" else None)
        assert response.status_code == 401
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
        assert response.headers["www-authenticate"] == "Bearer"
    assert worker.submitted.empty()
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert keyed.http.get(path, headers=headers).status_code == 200
    assert 'afd_http_errors_total{status="401"} 4.0' in keyed.http.get("/metrics").text


def test_the_openai_client_calls_a_wrong_key_an_authentication_error(keyed):
    with (
        OpenAI(base_url=f"{keyed.url}/v1", api_key="guess", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert "guess" not in caught.value.message


def test_pages_of_allowed_origins_may_call_and_others_not(start, settings, worker):
    router = start(replace(settings, cors_origins=(PAGE,), api_keys=("key",)), worker)
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    preflight = router.http.options("/v1/completions", headers={"Origin": PAGE, **asks})
    assert preflight.status_code == 200, "a preflight carries no key"
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for stream in (False, True):
        answer = router.http.post(
            "/v1/completions", json={**BODY, "stream": stream}, headers={"Origin": PAGE, **bearer("key")}
        )
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    refused = router.http.post("/v1/completions", json=BODY, headers={"Origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE, "else the page cannot read why"
    stranger = {"Origin": "https://evil.example"}
    assert router.http.options("/v1/completions", headers={**stranger, **asks}).status_code == 400
    answer = router.http.get("/health", headers=stranger)
    assert "access-control-allow-origin" not in answer.headers


def test_without_origins_there_is_no_cors(router):
    answer = router.http.get("/health", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_request_id_comes_back_with_answers_and_errors(router, stream):
    for body in ({**BODY, "stream": stream}, {**BODY, "stream": stream, "n": 0}):
        response = router.http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
    assert router.http.get("/nowhere", headers={"X-Request-Id": "mine-2"}).headers["x-request-id"] == "mine-2"


@pytest.mark.parametrize("theirs", [None, "", "a b", "x" * 129, "<script>"])
def test_a_request_without_a_sane_id_gets_one_of_ours(router, theirs):
    headers = {} if theirs is None else {"X-Request-Id": theirs}
    response = router.http.post("/v1/completions", json=BODY, headers=headers)
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"


def test_two_requests_with_one_id_do_not_meet(router, worker):
    worker.script = endless
    headers = {"X-Request-Id": "same"}
    body = {**BODY, "stream": True, "max_tokens": 200}
    with router.http.stream("POST", "/v1/completions", json=body, headers=headers) as first:
        next(first.iter_lines())
        with router.http.stream("POST", "/v1/completions", json=body, headers=headers) as second:
            next(second.iter_lines())
            assert (first.status_code, second.status_code) == (200, 200)


def access_lines(caplog):
    return [record for record in caplog.records if record.name == "router.access"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_one_line_with_lengths_and_times_and_without_its_words(keyed, caplog, stream, tokenizer):
    with caplog.at_level(logging.INFO):
        headers = {**bearer("first-key"), "X-Request-Id": "mine"}
        keyed.http.post("/v1/completions", json={**BODY, "stream": stream}, headers=headers).raise_for_status()
        [record] = eventually(lambda: access_lines(caplog), "logged")
    entry = json.loads(JsonFormatter("router").format(record))
    assert (entry["request_id"], entry["route"], entry["status"]) == ("mine", "/v1/completions", 200)
    assert entry["prompt_tokens"] == len(tokenizer.encode(BODY["prompt"], special=True))
    assert entry["generated_tokens"] == len(tokenizer.encode("Paris is the city of light", special=False))
    assert 0 < entry["ttft_s"] <= entry["total_s"]
    assert (entry["finish_reasons"], entry["level"]) == ("stop", "info")
    assert "route=/v1/completions" in entry["message"]
    assert not any(word in caplog.text for word in ("secret", "Paris", "first-key"))


def test_a_refused_key_is_not_logged(keyed, caplog):
    with caplog.at_level(logging.DEBUG, "router"):
        keyed.http.get("/v1/models", headers=bearer("a-guess"))
        [record] = eventually(lambda: access_lines(caplog), "logged")
    assert record.fields["status"] == 401
    assert "a-guess" not in caplog.text


def test_a_path_cannot_forge_a_line(router, caplog):
    with caplog.at_level(logging.INFO):
        router.http.get("/v1/%0afake%20line")
        [record] = eventually(lambda: access_lines(caplog), "logged")
    assert "\n" not in record.getMessage()


def test_a_client_that_leaves_is_logged_as_gone(router, worker, caplog):
    worker.script = endless
    with caplog.at_level(logging.INFO):
        with router.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            next(response.iter_lines())
        [record] = eventually(lambda: access_lines(caplog), "logged")
    assert record.fields["generated_tokens"] >= 1
    assert record.fields["finish_reasons"] == ""


def refused_head(router, head):
    """What the server says to these bytes, read until it closes."""
    with socket.create_connection(("127.0.0.1", httpx.URL(router.url).port), timeout=10) as client:
        answer = b""
        try:
            client.sendall(head)
            while data := client.recv(1 << 16):
                answer += data
        except ConnectionError:
            pass  # it does not read to the end what it has refused
    return answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 21 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 5000 + b"\r\n\r\n",
        b"GET /health?" + b"b" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_a_head_beyond_the_limits_is_refused_and_the_server_goes_on(start, settings, worker, head):
    router = start(replace(settings, max_header_bytes=4096, max_headers=20), worker)
    answer = refused_head(router, head)
    assert answer.startswith(b"HTTP/1.1 431 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "headers_too_large"
    assert "router.max_header_kib" in error["message"]
    assert router.http.get("/health").status_code == 200


def test_a_header_line_without_end_is_cut_off(start, settings, worker):
    router = start(replace(settings, max_header_bytes=4096), worker)
    with socket.create_connection(("127.0.0.1", httpx.URL(router.url).port), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: ")
        with pytest.raises(ConnectionError):
            client.sendall(b"b" * (64 << 20))
    assert router.http.get("/health").status_code == 200


def test_what_is_no_http_is_refused_as_before(router):
    assert refused_head(router, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_sent(start, settings, worker):
    router = start(replace(settings, max_body_bytes=1000), worker)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(router.url).port), timeout=10) as client:
        client.sendall(head)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
