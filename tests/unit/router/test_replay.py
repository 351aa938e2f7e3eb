"""A choice that loses its worker goes on at another: the client sees a pause, nothing twice, and nothing missing."""

from __future__ import annotations

import json
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from scripted_worker import ScriptedWorker, Tape, cluster, endless, silent

from afd.errors import Unavailable
from afd.types import GenerateOutput, SamplingParams
from router.relay.job import Job

PROMPT = {"model": "tiny", "prompt": "a", "max_tokens": 200}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = "Grüezi 😀, the city of light"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 😀"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WAITS_S = 30.0


@pytest.fixture
def two(worker):
    """Two workers; the first is asked first."""
    other = ScriptedWorker(silent, attention_rank=1)
    yield worker, other
    other.die()


def eventually(condition, what="so"):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.01)


def post(router, **fields):
    return router.http.post("/v1/completions", json={**PROMPT, **fields})


def in_background(work):
    results = queue.Queue()
    threading.Thread(target=lambda: results.put(work()), daemon=True).start()
    return lambda: results.get(timeout=20)


def events(lines):
    """What a stream says, without what is random: ids and times."""
    said = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    for event in said:
        for name in ("id", "created"):
            event.pop(name, None)
        for choice in event.get("choices", ()):
            for call in choice.get("delta", {}).get("tool_calls", ()):
                call.pop("id", None)
    return said


def tokens_of(event):
    return [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]


def stream_of(router, path, body, after=None, then=lambda: None):
    """The events of a stream; `then` is called once `after` tokens have come."""
    with router.http.stream("POST", path, json={**body, "stream": True, "return_token_ids": True}) as response:
        assert response.status_code == 200, response.read()
        lines, num_tokens = [], 0
        for line in response.iter_lines():
            lines.append(line)
            if line.startswith("data: {"):
                num_tokens += len(tokens_of(json.loads(line.removeprefix("data: "))))
            if num_tokens == after:
                then()
                after = None
    assert after is None, f"{num_tokens} tokens came"
    return events(lines)


def metric(router, name):
    return next(
        float(line.split()[-1]) for line in router.http.get("/metrics").text.splitlines() if line.startswith(name)
    )


def only_the_first(start, settings, first, second):
    """A router that may use only the first of two workers."""
    router = start(replace(settings, replay_s=WAITS_S), first, second)
    router.view = cluster(first.view(), second.view("draining"))
    eventually(lambda: not router.gateway.pool.members[1].usable)
    return router


def first_dies(router, first, second):
    router.view = cluster(first.view(), second.view())
    first.die()


# ---- nothing twice, nothing missing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 6, 8, 14])
@pytest.mark.parametrize(
    ("path", "text", "fields"),
    [
        ("/v1/completions", TEXT, {**PROMPT, "logprobs": 0}),
        ("/v1/completions", TEXT, {**PROMPT, "n": 3, "stop": ["of li", "zi "], "min_tokens": 12}),
        ("/v1/chat/completions", TEXT, {**CHAT, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", f"See: {CALL}", {**CHAT, "tools": [TOOL]}),
    ],
)
def test_a_stream_that_is_cut_says_what_it_would_have_said(start, settings, tokenizer, two, path, text, fields, cut):
    ids = tokenizer.encode(text, special=False)
    first, second = two
    first.script = second.script = Tape(ids)
    router = only_the_first(start, replace(settings, max_context=1024), first, second)
    undisturbed = stream_of(router, path, fields)
    first.script, n = Tape(ids, until=cut), fields.get("n", 1)
    disturbed = stream_of(router, path, fields, cut * n, lambda: first_dies(router, first, second))
    assert sorted(disturbed, key=str) == sorted(undisturbed, key=str)
    assert metric(router, "afd_replays_total") == n
    assert metric(router, "afd_request_retries_total") == 0


def test_a_replay_is_the_same_request_with_the_same_seed_behind_the_tokens_so_far(start, settings, tokenizer, two):
    first, second = two
    ids = tokenizer.encode(TEXT, special=False)
    first.script, second.script = Tape(ids, until=5), Tape(ids)
    router = only_the_first(start, replace(settings, policy="session"), first, second)
    fields = {
        **PROMPT,
        "user": "me",
        "n": 2,
        "priority": 3,
        "cache_salt": "x",
        "guided_regex": ".*",
        "temperature": 0.9,
    }
    stream_of(router, "/v1/completions", fields, 10, lambda: first_dies(router, first, second))
    asked, again = ([worker.submitted.get(timeout=5) for _ in range(2)] for worker in two)
    assert all(request.sampling.seed is not None and not request.replay for request in asked)
    assert len({request.sampling.seed for request in asked}) == 2
    by_id = {request.request_id: request for request in again}
    for request in asked:
        assert by_id[request.request_id] == replace(request, generated_token_ids=tuple(ids[:5]), replay=True)


def test_choices_without_a_seed_have_each_a_random_one_and_with_one_its_successors(tokenizer):
    def seeds(seed):
        job = Job("j", ((5,), (5,)), (SamplingParams(seed=seed),) * 2, n=2)
        return [choice.request.sampling.seed for choice in job.choices(tokenizer)]

    assert seeds(2**64 - 1) == [2**64 - 1, 0] * 2
    drawn = seeds(None) + seeds(None)
    assert len(set(drawn)) == 8
    assert all(0 <= seed < 2**64 for seed in drawn)


@pytest.mark.parametrize("fields", [{"logprobs": 1}, {"n": 2, "best_of": 4}, {"echo": True}])
def test_a_whole_answer_is_whole_after_a_cut_and_its_usage_counts_each_token_once(
    start, settings, tokenizer, two, fields
):
    ids = tokenizer.encode(TEXT, special=False)
    first, second = two
    first.script = second.script = Tape(ids)
    router = only_the_first(start, settings, first, second)
    undisturbed = post(router, **fields).json()
    generated = metric(router, "afd_generation_tokens_total")
    first.script, second.script = Tape(ids, until=9), Tape(ids)
    answer = in_background(lambda: post(router, **fields))
    num_choices = fields.get("best_of", 1)
    eventually(lambda: metric(router, "afd_generation_tokens_total") == generated + 9 * num_choices)
    first_dies(router, first, second)
    again = answer().json()
    for reply in (undisturbed, again):
        del reply["id"], reply["created"]
    assert again == undisturbed
    assert metric(router, "afd_generation_tokens_total") == generated + len(ids) * num_choices
    assert metric(router, "afd_prompt_tokens_total") == 2


def test_a_choice_is_cut_again_and_again(start, settings, tokenizer, two):
    ids = tokenizer.encode(TEXT, special=False)
    workers = [*two, *(ScriptedWorker(silent, rank) for rank in (2, 3))]
    for place, worker in enumerate(workers):
        worker.script = Tape(ids, until=3 * place + 3 if worker is not workers[-1] else None)
    router = start(replace(settings, policy="round_robin"), *workers)
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True, "return_token_ids": True}) as r:
        said, lines = [], r.iter_lines()
        for worker in workers[:-1]:
            target = worker.script.until
            while sum(len(tokens_of(event)) for event in said) < target:
                said += events([next(lines)])
            worker.die()
        said += events(lines)
    assert "".join(choice["text"] for event in said for choice in event["choices"]) == TEXT
    assert [token for event in said for token in tokens_of(event)] == ids
    assert metric(router, "afd_replays_total") == 3
    for worker in workers[2:]:
        worker.die()


# ---- waiting for a worker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [True, False])
def test_without_another_worker_a_request_waits_for_one(start, settings, tokenizer, worker, begun):
    ids = tokenizer.encode(TEXT, special=False)
    worker.script = Tape(ids, until=7 if begun else 0)
    router = start(replace(settings, replay_s=WAITS_S), worker)
    stream = in_background(lambda: stream_of(router, "/v1/completions", PROMPT))
    worker.submitted.get(timeout=5)
    eventually(lambda: metric(router, "afd_generation_tokens_total") == (7 if begun else 0))
    worker.die()
    router.view = cluster(worker.view("lost", "attention worker 0 was killed"))
    eventually(lambda: len(router.gateway.pool.stranded) == 1)
    assert post(router).status_code == 503, "a new request is refused at once"
    heir = ScriptedWorker(Tape(ids))
    router.view = cluster(heir.view())
    said = stream()
    assert [token for event in said for token in tokens_of(event)] == ids
    assert metric(router, "afd_replays_total" if begun else "afd_request_retries_total") == 1
    assert heir.submitted.get(timeout=5).replay
    heir.die()


def test_a_request_that_no_worker_takes_over_in_time_ends_with_a_sentence(start, settings, worker):
    worker.script = endless
    router = start(replace(settings, replay_s=0.3), worker)
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        worker.die()
        error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
    assert error["type"] == "service_unavailable"
    assert "attention worker 0" in error["message"]
    assert "0.3 s (router.replay_s)" in error["message"]


def test_its_own_time_runs_on_while_a_request_waits_for_a_worker(start, settings, worker):
    worker.script = endless
    router = start(replace(settings, replay_s=WAITS_S), worker)
    body = {**PROMPT, "stream": True, "timeout": 1.0}
    with router.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        worker.die()
        error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
    assert error["code"] == "timeout"
    assert len(router.gateway.pool.stranded) == 0


def test_a_client_that_leaves_while_its_request_waits_is_forgotten(start, settings, worker):
    worker.script = endless
    router = start(replace(settings, replay_s=WAITS_S), worker)
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        worker.die()
        eventually(lambda: len(router.gateway.pool.stranded) == 1)
    eventually(lambda: len(router.gateway.pool.stranded) == 0)
    heir = ScriptedWorker(endless)
    router.view = cluster(heir.view())
    eventually(lambda: router.http.get("/health").status_code == 200)
    assert heir.submitted.empty()
    heir.die()


def test_a_server_that_stops_does_not_wait_for_workers(start, settings, worker):
    worker.script = endless
    router = start(replace(settings, replay_s=WAITS_S, drain_s=0.2), worker)
    with router.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        worker.die()
        eventually(lambda: len(router.gateway.pool.stranded) == 1)
        router.server.stop()
        error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
    assert "shutting down" in error["message"]
    router.join()


def test_a_worker_that_refuses_for_a_while_is_asked_again(start, settings, tokenizer, worker):
    """As one does that is lost to the requests it had, and not yet to the cluster view."""
    ids, refusals = tokenizer.encode(TEXT, special=False), [3]
    tape = Tape(ids)

    async def moody(request):
        if refusals[0]:
            refusals[0] -= 1
            yield GenerateOutput(request.request_id, (), "error", error="not now", refused="unavailable")
            return
        async for output in tape(request):
            yield output

    worker.script = moody
    router = start(replace(settings, replay_s=WAITS_S), worker)
    assert post(router).json()["choices"][0]["text"] == TEXT


# ---- who is lost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no step", "no answer"])
def test_a_frozen_worker_is_lost_and_what_it_says_late_is_not_heard(start, settings, tokenizer, two, how):
    ids = tokenizer.encode(TEXT, special=False)
    first, second = two
    first.script, second.script = Tape(ids, until=6), Tape(ids, until=15)
    first.answers_status = how == "no step"
    limits = {"deadline_s": 0.6} if how == "no step" else {"silence_s": 0.5}
    router = start(replace(settings, **limits), first, second)
    stream = in_background(lambda: stream_of(router, "/v1/completions", PROMPT))
    second.submitted.get(timeout=15)
    assert first.submitted.get(timeout=5)
    first.script.released.set()  # it goes on as if nothing had been
    eventually(lambda: metric(router, "afd_generation_tokens_total") == 15)
    second.script.released.set()
    said = stream()
    assert [token for event in said for token in tokens_of(event)] == ids
    assert second.submitted.empty()
    first.streams_ended.get(timeout=10)


def test_a_worker_that_does_not_answer_is_not_chosen_where_another_does(start, settings, tokenizer, two):
    first, second = two
    first.answers_status, second.script = False, Tape(tokenizer.encode(TEXT, special=False))
    router = start(settings, first, second)
    eventually(lambda: not router.gateway.pool.members[0].answers, "found silent")
    assert router.gateway.pool.members[0].usable
    assert post(router).json()["choices"][0]["text"] == TEXT
    assert first.submitted.empty()


def test_a_request_that_loses_worker_after_worker_without_a_token_is_not_sent_to_a_fourth(start, settings, two):
    workers = [*two, *(ScriptedWorker(silent, rank) for rank in (2, 3))]
    for worker in workers:
        worker.script = silent
    router = start(replace(settings, policy="round_robin", replay_s=WAITS_S), *workers)
    answer = in_background(lambda: post(router))
    for worker in workers[:3]:
        worker.submitted.get(timeout=5)
        worker.die()
    response = answer()
    assert response.status_code == 503
    assert "attention worker 2" in response.json()["error"]["message"]
    assert "3 workers in a row" in response.json()["error"]["message"]
    assert workers[3].submitted.empty()
    for worker in workers[2:]:
        worker.die()


# ---- handing over ---------------------------------------------------------------------------------------------------


def hand_over(router, attention_rank):
    done = queue.Queue()

    def do():
        try:
            done.put(router.gateway.pool.hand_over(attention_rank))
        except Unavailable as error:
            done.put(error)

    router.server._loop.call_soon_threadsafe(do)
    return done.get(timeout=5)


def test_a_worker_hands_its_requests_over_and_gets_no_more(start, settings, tokenizer, two):
    ids = tokenizer.encode(TEXT, special=False)
    first, second = two
    first.script, second.script = Tape(ids, until=10), Tape(ids)
    router = start(settings, first, second)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(stream_of, router, "/v1/completions", PROMPT)
        submitted = first.submitted.get(timeout=5).request_id
        eventually(lambda: metric(router, "afd_generation_tokens_total") == 10)
        assert hand_over(router, 0) is None
        said = stream.result(timeout=15)
    assert [token for event in said for token in tokens_of(event)] == ids
    assert first.cancelled.get(timeout=5) == submitted
    for _ in range(3):
        assert post(router).json()["choices"][0]["text"] == TEXT
    assert first.submitted.empty()
    assert isinstance(hand_over(router, 1), Unavailable), "the last one keeps what it has"
    assert hand_over(router, 7) is None
