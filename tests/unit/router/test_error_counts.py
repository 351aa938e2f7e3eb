"""afd_http_errors: every answer that is an error, whoever gives it, counted once."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import replace

import httpx
import pytest
from scripted_worker import endless

from afd.types import GenerateOutput, SampledToken

BODY = {"model": "tiny", "prompt": "Paris", "max_tokens": 8}


def counted(router):
    """How many errors there were, by status. The client may have an answer before it is counted."""
    text = router.http.get("/metrics", headers={"Authorization": "Bearer key"}).text
    samples = re.findall(r'^afd_http_errors_total\{status="(\d+)"\} (\S+)$', text, re.M)
    return {int(status): float(count) for status, count in samples}


def wait_for(router, expected):
    end = time.monotonic() + 10
    while (seen := counted(router)) != expected and time.monotonic() < end:
        time.sleep(0.01)
    assert seen == expected


async def breaks_off(request):
    yield GenerateOutput(request.request_id, (SampledToken(request.prompt_token_ids[-1]),))
    yield GenerateOutput(request.request_id, (), "error", error="the FFN side is gone")


def raw(router, *pieces):
    """Sends bytes that an HTTP client would not."""
    with socket.create_connection(("127.0.0.1", httpx.URL(router.url).port), timeout=10) as client:
        for piece in pieces:
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/models/other", None, 404),
        ("POST", "/health", None, 405),
        ("POST", "/v1/completions", {**BODY, "n": 0}, 400),
        ("POST", "/v1/chat/completions", {"model": "other", "messages": [{"role": "user", "content": "x"}]}, 404),
        ("POST", "/tokenize", {"model": "tiny"}, 400),
        ("POST", "/detokenize", {"model": "tiny", "tokens": [0] * 2000}, 413),
        ("GET", "/debug/timeline?seconds=soon", None, 400),
    ],
)
def test_a_refusal_is_counted_once_wherever_it_is_made(start, settings, worker, method, path, body, status):
    router = start(replace(settings, max_body_bytes=1000), worker)
    assert router.http.request(method, path, json=body).status_code == status
    wait_for(router, {status: 1})


def test_without_a_key_and_without_workers(start, settings, worker):
    router = start(replace(settings, api_keys=("key",)), worker.view(state="lost", message="gone"))
    assert router.http.get("/v1/models").status_code == 401
    assert router.http.get("/ready").status_code == 503
    assert router.http.get("/health").status_code == 503
    wait_for(router, {401: 1, 503: 2})


def test_a_bug_is_counted(router, monkeypatch):
    async def bug():
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(router.gateway.pool, "refresh", bug)
        assert router.http.get("/status", headers={"Connection": "close"}).status_code == 500
    wait_for(router, {500: 1})


def test_an_error_in_the_middle_of_a_stream_is_counted_once(router, worker):
    worker.script = endless
    with router.http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 200, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        worker.die()
        assert (response.status_code, "error" in list(lines)[-2]) == (200, True)
    wait_for(router, {503: 1})


def test_an_error_in_place_of_an_answer_is_counted_once(router, worker):
    worker.script = breaks_off
    response = router.http.post("/v1/completions", json=BODY)
    assert (response.status_code, "the FFN side is gone" in response.text) == (503, True)
    wait_for(router, {503: 1})


def test_what_no_application_sees_is_counted(start, settings, worker):
    router = start(replace(settings, max_header_bytes=4096), worker)
    raw(router, b"nonsense\r\n\r\n")
    raw(router, b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 5000 + b"\r\n\r\n")
    wait_for(router, {400: 1, 431: 1})


def test_a_client_that_leaves_while_it_sends_has_a_status_of_its_own(router):
    raw(router, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b'"model"')
    wait_for(router, {499: 1})


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_well_is_no_error(router, stream):
    assert router.http.post("/v1/completions", json={**BODY, "stream": stream}).status_code == 200
    assert router.http.get("/ready").status_code == 200
    assert counted(router) == {}
