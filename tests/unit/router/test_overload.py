"""The bounded queue, deadlines, priority, sessions, and what is tried again elsewhere."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from dataclasses import replace

import openai
import pytest
from scripted_worker import Say, ScriptedWorker, cluster, endless, silent

from afd.errors import DeadlineExceeded, QueueFull
from afd.types import GenerateOutput, SampledToken
from router.relay.admission import Admission
from router.relay.deadline import deadline

PROMPT = {"model": "tiny", "prompt": "a", "max_tokens": 200}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def in_background(work):
    results = queue.Queue()
    threading.Thread(target=lambda: results.put(work()), daemon=True).start()
    return lambda: results.get(timeout=15)


def eventually(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "never so"
        time.sleep(0.01)


def post(router, **fields):
    return router.http.post("/v1/completions", json={**PROMPT, **fields})


def refusing(refused):
    """A script: the worker has no place for the request."""

    async def script(request):
        yield GenerateOutput(request.request_id, (), "error", error="the worker cannot take it", refused=refused)

    return script


# ---- the queue -----------------------------------------------------------------------------------------------------


def test_past_the_queue_a_request_is_refused_with_429_and_when_to_come_again(start, settings, worker, say):
    worker.script = silent
    router = start(replace(settings, max_queue=2), worker)
    waiting = in_background(lambda: post(router, n=2))
    first, _ = worker.submitted.get(timeout=5), worker.submitted.get(timeout=5)
    response = post(router)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "router.max_queue is 2" in error["message"]
    with pytest.raises(openai.RateLimitError):
        router.openai.chat.completions.create(**CHAT)
    worker.script = say("there is room again")
    router.view = cluster()
    assert waiting().status_code == 503
    router.view = cluster(worker.view())
    eventually(lambda: router.http.get("/health").status_code == 200)
    assert post(router).status_code == 200
    assert first.request_id.endswith("-0")


def test_a_request_with_its_first_token_is_in_nobodys_way(start, settings, worker):
    worker.script = endless
    router = start(replace(settings, max_queue=1), worker)
    for _ in range(3):
        with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
            assert response.status_code == 200
            next(response.iter_lines())
    assert router.gateway._relay.admission.waiting == 0


def test_the_pace_of_the_queue_says_when_to_come_again():
    now = [0.0]
    admission = Admission(40, clock=lambda: now[0])
    assert admission.retry_after_s == 1
    admission.enter(41)
    with pytest.raises(QueueFull, match="41 requests") as full:
        admission.enter(1)
    assert full.value.retry_after_s == 1
    for _ in range(40):
        now[0] += 0.5
        admission.leave()
    assert 8 <= admission.retry_after_s <= 10
    for _ in range(60):
        admission.enter(1)
        now[0] += 60.0
        admission.leave()
    assert admission.retry_after_s == 60


# ---- deadlines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["body", "header", "setting"])
def test_a_request_whose_time_runs_out_before_its_first_token_is_a_504_and_cancelled(
    start, settings, worker, stream, where
):
    worker.script = silent
    router = start(replace(settings, request_timeout_s=0.2 if where == "setting" else 30.0), worker)
    fields = {"timeout": 0.2 if where == "body" else 60.0} if where != "header" else {}
    headers = {"X-Request-Timeout": "0.2" if where == "header" else "60"}
    response = router.http.post("/v1/completions", json={**PROMPT, "stream": stream, **fields}, headers=headers)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    assert "0.2 s" in error["message"]
    assert worker.cancelled.get(timeout=5) == worker.submitted.get(timeout=5).request_id
    assert 'finished_reason="timeout"} 1.0' in router.http.get("/metrics").text


def test_a_stream_whose_time_runs_out_ends_with_an_error_event(router, worker):
    worker.script = endless
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True, "timeout": 0.3}) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert len(events) > 1
    assert json.loads(events[-1])["error"]["code"] == "timeout"
    assert worker.cancelled.get(timeout=5)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_header_that_is_no_number_of_seconds_is_refused(router, value):
    response = router.http.post("/v1/completions", json=PROMPT, headers={"X-Request-Timeout": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"


def test_within_its_deadline_a_block_is_left_alone_and_others_cancellations_are_theirs():
    async def play():
        with deadline(30.0):
            await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match=r"0\.01 s"), deadline(0.01):
            await asyncio.Event().wait()

        async def waits():
            with deadline(30.0):
                await asyncio.Event().wait()

        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(play())


# ---- priority, salt, session ---------------------------------------------------------------------------------------


def test_priority_and_salt_reach_the_worker(router, worker):
    assert post(router, priority=-3, cache_salt="tenant", user="me").status_code == 200
    request = worker.submitted.get(timeout=5)
    assert (request.priority, request.cache_salt) == (-3, "tenant")


@pytest.mark.parametrize("field", ["user", "prompt_cache_key", "header"])
def test_a_session_goes_to_one_worker(start, settings, say, field):
    workers = [ScriptedWorker(say("hi"), rank) for rank in range(3)]
    router = start(replace(settings, policy="session"), *workers)
    for name in ("a", "b", "c", "d"):
        for _ in range(3):
            fields = {} if field == "header" else {field: name}
            headers = {"X-Session-Id": name} if field == "header" else {}
            assert router.http.post("/v1/completions", json={**PROMPT, **fields}, headers=headers).status_code == 200
    assert sorted(w.submitted.qsize() % 3 for w in workers) == [0, 0, 0]
    assert sum(w.submitted.qsize() > 0 for w in workers) > 1
    for each in workers:
        each.die()


# ---- another worker ------------------------------------------------------------------------------------------------


def test_a_request_without_a_token_goes_on_at_another_worker_when_its_own_is_lost(start, settings, worker, say):
    other = ScriptedWorker(say("from the other"), attention_rank=1)
    worker.script = silent
    router = start(settings, worker, other)
    answer = in_background(lambda: post(router))
    worker.submitted.get(timeout=5)
    worker.die()
    assert answer().json()["choices"][0]["text"] == "from the other"
    assert "afd_request_retries_total 1.0" in router.http.get("/metrics").text
    other.die()


@pytest.mark.parametrize(("refused", "status"), [("unavailable", 503), ("full", 429)])
def test_a_refusal_is_tried_elsewhere_once_each_and_then_told(start, settings, worker, say, refused, status):
    other = ScriptedWorker(say("from the other"), attention_rank=1)
    worker.script = refusing(refused)
    router = start(settings, worker, other)
    assert post(router).json()["choices"][0]["text"] == "from the other"
    other.script = refusing(refused)
    response = post(router)
    assert response.status_code == status
    assert response.json()["error"]["message"] == "the worker cannot take it"
    assert int(response.headers["retry-after"]) >= 1
    other.die()


def test_a_worker_that_says_it_drains_gets_nothing_new_though_the_view_has_not_heard(start, settings, worker, say):
    other = ScriptedWorker(say("from the other"), attention_rank=1)
    worker.state = "draining"
    router = start(settings, worker, other)
    for _ in range(3):
        assert post(router).json()["choices"][0]["text"] == "from the other"
    assert worker.submitted.empty()
    other.die()


# ---- several routers -----------------------------------------------------------------------------------------------


def test_two_routers_share_a_worker_and_neither_ends_the_others_requests(start, settings, worker, tokenizer):
    release = threading.Event()

    async def held(request):
        async for output in Say(tokenizer.encode("done", special=False))(request):
            while not release.is_set():
                await asyncio.sleep(0.01)
            yield output

    worker.script = held
    one, two = start(settings, worker), start(settings, worker)
    answers = [in_background(lambda router=router: post(router)) for router in (one, two)]
    for _ in answers:
        worker.submitted.get(timeout=5)
    with one.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True, "timeout": 0.1}) as response:
        assert response.status_code == 504
    worker.cancelled.get(timeout=5)
    one.view = cluster()  # this router lets go of the worker
    assert answers[0]().status_code == 503
    release.set()
    assert answers[1]().json()["choices"][0]["text"] == "done"


def test_what_another_router_has_sent_a_worker_counts(start, settings, worker, say):
    other = ScriptedWorker(say("hi"), attention_rank=1)
    worker.busy_tokens = 500
    worker.script = other.script
    router = start(settings, worker, other)
    for _ in range(3):
        assert post(router).status_code == 200
    assert (worker.submitted.qsize(), other.submitted.qsize()) == (0, 3)
    other.die()


# ---- the prefix cache, seen from outside ---------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_usage_says_how_much_of_the_prompt_was_cached(router, worker, stream):
    async def cached(request):
        yield GenerateOutput(request.request_id, (SampledToken(70),), cached_tokens=3)
        yield GenerateOutput(request.request_id, (SampledToken(71),), "length")

    worker.script = cached
    body = {**PROMPT, "prompt": [[70] * 5, [71] * 6], "n": 2, "stream": stream}
    response = router.http.post(
        "/v1/completions", json=body | ({"stream_options": {"include_usage": True}} if stream else {})
    )
    answer = json.loads(response.text.split("data: ")[-2]) if stream else response.json()
    assert answer["usage"]["prompt_tokens"] == 11
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


def test_metrics_say_how_much_each_worker_found_cached(router):
    text = router.http.get("/metrics").text
    assert 'afd_prefix_cache_queries_total{attention_rank="0"} 90.0' in text
    assert 'afd_prefix_cache_hits_total{attention_rank="0"} 60.0' in text


def test_requests_that_give_up_say_nothing_of_how_fast_the_queue_moves():
    now = [0.0]
    admission = Admission(40, clock=lambda: now[0])
    admission.enter(140)
    for _ in range(30):
        now[0] += 2.0
        admission.leave()
    before = admission.retry_after_s
    admission.give_up(100)
    assert admission.waiting == 10
    assert admission.retry_after_s == before > 10
