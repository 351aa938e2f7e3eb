"""Clients that leave, workers that die or hang, shutting down. A test waits for what it expects, never for time."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
from scripted_worker import Say, ScriptedWorker, cluster, endless, silent

from afd.errors import ClusterError, ConfigError
from afd.types import GenerateOutput, Role, WorkerView
from router.app import Server, bind

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "tiny", "prompt": "a", "max_tokens": 200}


def last_event(lines):
    """The last data line of a stream read to its end."""
    return [line for line in lines if line][-1].removeprefix("data: ")


def eventually(condition, what):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.01)


def in_background(work):
    """Runs `work` on a thread; gives a function that waits for its result."""
    results = queue.Queue()
    threading.Thread(target=lambda: results.put(work()), daemon=True).start()
    return lambda: results.get(timeout=15)


def test_a_client_that_leaves_a_stream_cancels_at_the_worker(router, worker):
    worker.script = endless
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True, "n": 2}) as response:
        next(response.iter_lines())
    submitted = {worker.submitted.get(timeout=5).request_id for _ in range(2)}
    assert {worker.cancelled.get(timeout=5) for _ in range(2)} == submitted


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_cancels_at_the_worker(router, worker, stream):
    worker.script = silent
    body = json.dumps({**PROMPT, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", httpx.URL(router.url).port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        submitted = worker.submitted.get(timeout=5).request_id
    assert worker.cancelled.get(timeout=5) == submitted
    eventually(lambda: 'finished_reason="abort"} 1.0' in router.http.get("/metrics").text, "counted as aborted")


def test_a_worker_lost_in_a_stream_ends_it_with_an_error_event(router, worker):
    worker.script = endless
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        worker.die()
        error = json.loads(last_event(lines))["error"]
    assert error["type"] == "service_unavailable"
    assert "attention worker 0" in error["message"]


def test_the_openai_client_raises_when_a_stream_breaks(router, worker):
    worker.script = endless
    stream = router.openai.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
    next(iter(stream))
    worker.die()
    with pytest.raises(openai.APIError, match="attention worker 0"):
        list(stream)


def test_a_worker_lost_before_the_whole_answer_is_a_503(router, worker):
    worker.script = silent
    answer = in_background(lambda: router.http.post("/v1/chat/completions", json=CHAT))
    worker.submitted.get(timeout=5)
    worker.die()
    response = answer()
    assert response.status_code == 503
    assert "attention worker 0" in response.json()["error"]["message"]


def test_requests_after_the_loss_get_503_with_the_reason_and_health_says_so(router, worker):
    worker.die()
    router.view = cluster(worker.view("lost", "attention worker 0 exited with code 137"))
    eventually(lambda: "code 137" in router.http.get("/health").text, "told by /health")
    assert router.http.get("/health").status_code == 503
    response = router.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "exited with code 137" in response.json()["error"]["message"]
    assert "exited with code 137" in router.http.get("/status").json()["problem"]


def test_a_worker_that_comes_back_elsewhere_serves_again(router, worker, say):
    worker.die()
    router.view = cluster(worker.view("lost", "gone"))
    eventually(lambda: router.http.get("/health").status_code == 503, "unhealthy")
    heir = ScriptedWorker(say("back again"))
    router.view = cluster(heir.view())
    eventually(lambda: router.http.get("/health").status_code == 200, "healthy again")
    answer = router.openai.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "back again"
    heir.die()


def test_a_broken_stream_to_a_living_worker_is_opened_again(router, worker):
    client = router.gateway.pool.members[0].client
    client._call.cancel()
    worker.streams_ended.get(timeout=5)
    eventually(lambda: router.gateway.pool.members and router.gateway.pool.members[0].client is not client, "replaced")
    eventually(lambda: router.http.get("/health").status_code == 200, "healthy again")
    assert router.openai.chat.completions.create(**CHAT).choices[0].message.content


def test_a_lost_ffn_worker_stops_new_requests_with_its_sentence(router, worker):
    ffn = WorkerView(Role.FFN, 0, "lost", message="FFN worker 0 was killed by signal 9")
    router.view = cluster(worker.view(), ffn)
    eventually(lambda: router.http.get("/health").status_code == 503, "unhealthy")
    response = router.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "FFN worker 0 was killed by signal 9"


def test_requests_go_to_the_worker_with_the_fewest_tokens(start, settings, worker):
    other = ScriptedWorker(silent, attention_rank=1)
    worker.script = silent
    router = start(settings, worker, other)
    short = {**PROMPT, "prompt": [7] * 10}
    answers = [in_background(lambda: router.http.post("/v1/completions", json={**PROMPT, "prompt": [7] * 40}))]
    assert len(worker.submitted.get(timeout=5).prompt_token_ids) == 40
    for expected in (other, other, other, other, worker):  # 10 to 40 tokens there, then it is even on tokens
        answers.append(in_background(lambda: router.http.post("/v1/completions", json=short)))
        expected.submitted.get(timeout=5)
    for each in (worker, other):
        each.die()
    assert {answer().status_code for answer in answers} == {503}


def test_a_draining_worker_finishes_its_requests_and_gets_no_more(start, settings, worker, say):
    other = ScriptedWorker(say("from the other"), attention_rank=1)
    worker.script = endless
    router = start(settings, worker, other)
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        router.view = cluster(worker.view("draining"), other.view())
        eventually(lambda: not router.gateway.pool.members[0].usable, "seen draining")
        for _ in range(3):
            answer = router.openai.chat.completions.create(**CHAT)
            assert answer.choices[0].message.content == "from the other"
        assert "error" not in next(line for line in lines if line)
    other.die()


def test_a_worker_that_makes_no_progress_is_given_up_after_the_deadline(start, settings, worker):
    worker.script = silent
    router = start(replace(settings, deadline_s=0.5), worker)
    response = router.http.post("/v1/completions", json=PROMPT)
    assert response.status_code == 503
    assert "attention worker 0" in response.json()["error"]["message"]
    assert "0.5 s" in response.json()["error"]["message"]


def test_a_worker_whose_steps_go_on_may_be_silent_for_longer_than_the_deadline(start, settings, worker, tokenizer):
    asked = queue.Queue()

    async def late(request):
        while asked.qsize() < 8:  # Status calls: at a quarter of the deadline each, twice the deadline in all
            await asyncio.sleep(0.01)
        async for output in Say(tokenizer.encode("late", special=False))(request):
            yield output

    worker.script = late
    worker.steps_on_status = 1
    worker.on_status = lambda: asked.put(None)
    router = start(replace(settings, deadline_s=0.8), worker)
    assert router.http.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"] == "late"


def test_on_stop_new_requests_are_refused_and_running_ones_finish(start, settings, worker, tokenizer):
    release = threading.Event()

    async def held(request):
        ids = tokenizer.encode("done at last", special=False)
        async for output in Say(ids)(request):
            yield output
            while not release.is_set():
                await asyncio.sleep(0.01)

    worker.script = held
    router = start(settings, worker)
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        text = json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        router.server.stop()
        eventually(lambda: httpx.get(f"{router.url}/health").status_code == 503, "draining")
        late = httpx.post(f"{router.url}/v1/chat/completions", json=CHAT)
        assert late.status_code == 503
        assert "shutting down" in late.json()["error"]["message"]
        release.set()
        *chunks, done = [line.removeprefix("data: ") for line in lines if line]
    assert done == "[DONE]"
    assert text + "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "done at last"
    router.join()


def test_a_request_that_outlives_the_drain_is_told(start, settings, worker):
    worker.script = endless
    router = start(replace(settings, drain_s=0.2), worker)
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        router.server.stop()
        error = json.loads(last_event(lines))["error"]
    assert "shutting down" in error["message"]
    router.join()
    worker.streams_ended.get(timeout=5)


def test_a_cluster_that_became_ready_after_the_server_was_made_is_served_at_once(settings, worker):
    """The view is not polled again within this test."""
    views = [cluster(worker.view("starting"))]
    seen = queue.Queue()

    def ask(url: str) -> None:
        seen.put(httpx.post(f"{url}/v1/chat/completions", json=CHAT))
        server.stop()

    ready = lambda url: threading.Thread(target=ask, args=(url,), daemon=True).start()  # noqa: E731
    server = Server(replace(settings, poll_s=60.0), lambda: views[-1], bind("127.0.0.1", 0), on_ready=ready)
    views.append(cluster(worker.view()))
    server.run()
    response = seen.get(timeout=15)
    assert response.status_code == 200, response.text


def test_when_one_choice_fails_its_siblings_count_as_failed_too(router, worker):
    async def one_fails(request):
        if request.request_id.endswith("-1"):
            yield GenerateOutput(request.request_id, (), "error", error="broken")
        async for output in endless(request):
            yield output

    worker.script = one_fails
    assert router.http.post("/v1/completions", json={**PROMPT, "n": 3}).status_code == 503
    text = router.http.get("/metrics").text
    assert 'afd_request_success_total{finished_reason="error"} 3.0' in text
    assert "abort" not in [line.split('"')[1] for line in text.splitlines() if "finished_reason=" in line]


def test_stop_before_run_means_run_returns_at_once(settings, worker):
    server = Server(settings, lambda: cluster(worker.view()), bind("127.0.0.1", 0))
    server.stop()
    server.run()


def test_stop_may_come_from_a_signal_handler_of_the_thread_that_serves(settings, worker):
    def kick(url: str) -> None:
        assert httpx.get(f"{url}/health").status_code == 200
        os.kill(os.getpid(), signal.SIGUSR1)

    ready = lambda url: threading.Thread(target=kick, args=(url,), daemon=True).start()  # noqa: E731
    server = Server(settings, lambda: cluster(worker.view()), bind("127.0.0.1", 0), on_ready=ready)
    before = signal.signal(signal.SIGUSR1, lambda *_: server.stop())
    try:
        server.run()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_port_taken_between_bind_and_run_is_refused_too(start, settings, worker):
    first, second = bind("127.0.0.1", 0), None
    port = first.getsockname()[1]
    second = bind("127.0.0.1", port)  # neither listens yet
    with first:
        first.listen()
        with pytest.raises(ClusterError, match=rf"{port}.*router\.port"):
            Server(settings, lambda: cluster(worker.view()), second).run()


def test_a_taken_port_is_refused_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*router\.port \(--port\)"):
            bind("127.0.0.1", port)


def test_a_host_that_is_not_this_machine_is_refused():
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid.*router\.host"):
        bind("no.such.host.invalid", 0)
