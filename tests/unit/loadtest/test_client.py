"""The client and the driver against a server by script: what is sent, what is read, and what goes wrong."""

from __future__ import annotations

import asyncio
from itertools import islice, repeat

import pytest

from afd.errors import ConfigError
from afd.loadtest.client import Client, Target
from afd.loadtest.drive import Driver, Load, Run
from afd.loadtest.record import CUT, IN_STREAM, NO_CONNECTION, OK, TIMEOUT
from afd.loadtest.workload import Ask
from tests.unit.loadtest.scripted_server import Script, serving

ASK = Ask([300, 301, 302], 3, 5)


def drive(url: str, load: Load, *, asks: int = 1000, **target: object) -> Run:
    async def run() -> Run:
        driver = Driver(Target(url, "scripted", **target), islice(repeat(ASK), asks), load)  # type: ignore[arg-type]
        return await asyncio.wait_for(driver.drive(), 30.0)

    return asyncio.run(run())


def one(script: Script, **target: object) -> object:
    with serving(script) as url:
        (record,) = drive(url, Load(concurrency=1, requests=1), **target).records
        return record


def test_an_answer_is_read_event_by_event() -> None:
    script = Script(first_s=0.05, step_s=0.02)
    record = one(script)
    assert (record.status, record.output_tokens, record.input_tokens, record.counted) == (OK, 5, 7, True)
    assert len(record.times) == 5
    assert 0.05 <= record.ttft_s < 0.5
    assert 0.02 <= record.tpot_s < 0.2
    assert record.e2e_s >= 0.05 + 4 * 0.02
    assert script.bodies == [
        {
            "model": "scripted",
            "prompt": [300, 301, 302],
            "max_tokens": 5,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]


def test_for_chat_the_first_token_is_not_the_role() -> None:
    script = Script(first_s=0.1)
    record = one(script, endpoint="chat", ignore_eos=False)
    assert record.ttft_s >= 0.1
    assert len(record.times) == record.output_tokens == 5
    assert script.bodies[0]["messages"] == [{"role": "user", "content": [300, 301, 302]}]
    assert "ignore_eos" not in script.bodies[0]


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_events_cut_anywhere_are_read_all_the_same(pieces: int, keep_alive: bool) -> None:
    record = one(Script(pieces=pieces, keep_alive=keep_alive, first_s=0, step_s=0))
    assert (record.status, record.output_tokens, len(record.times)) == (OK, 5, 5)


def test_without_usage_events_are_counted() -> None:
    record = one(Script(usage=False))
    assert (record.status, record.output_tokens, record.input_tokens, record.counted) == (OK, 5, 3, False)


@pytest.mark.parametrize(
    ("script", "status", "sentence"),
    [
        (Script(status=lambda _: 429), "429", "refused with 429"),
        (Script(status=lambda _: 500, keep_alive=False), "500", "refused with 500"),
        (Script(cut_after=3), CUT, "connection broke"),
        (Script(cut_after=3, keep_alive=False), CUT, "before its answer did"),
        (Script(error_after=3), IN_STREAM, "the engine is gone"),
        (Script(whole=True), "not a stream", "refused with 200"),
        (Script(stall=True), TIMEOUT, "--timeout"),
    ],
)
def test_what_goes_wrong_is_told_in_the_record(script: Script, status: str, sentence: str) -> None:
    record = one(script, timeout_s=0.5)
    assert record.status == status
    assert sentence in record.error
    assert record.end_s > record.sent_s


def test_nobody_there_is_no_connection() -> None:
    (record,) = drive("http://127.0.0.1:1", Load(concurrency=1, requests=1)).records
    assert record.status == NO_CONNECTION
    assert "127.0.0.1:1" in record.error


def test_refusals_are_counted_and_the_others_are_answered() -> None:
    with serving(Script(status=lambda n: 429 if n % 3 == 2 else 200)) as url:
        run = drive(url, Load(concurrency=3, requests=30))
    statuses = [record.status for record in run.records]
    assert (statuses.count(OK), statuses.count("429")) == (20, 10)


def test_connections_are_used_again() -> None:
    script = Script(first_s=0, step_s=0)
    with serving(script) as url:
        run = drive(url, Load(concurrency=4, requests=40))
    assert all(record.ok for record in run.records)
    assert script.connections == 4


def test_a_server_that_closes_after_each_answer_is_asked_over_new_connections() -> None:
    script = Script(first_s=0, step_s=0, keep_alive=False)
    with serving(script) as url:
        run = drive(url, Load(concurrency=2, requests=10))
    assert all(record.ok for record in run.records)
    assert script.connections == 10


def test_a_closed_loop_keeps_its_number_in_flight() -> None:
    with serving(Script(first_s=0.02, step_s=0.002)) as url:
        run = drive(url, Load(concurrency=4, requests=40))
    assert len(run.records) == 40
    for record in run.records[4:-4]:
        in_flight = sum(other.sent_s <= record.sent_s < other.end_s for other in run.records)
        assert in_flight == 4


def test_an_open_loop_sends_at_its_times_whatever_the_server_does() -> None:
    due = [0.0, 0.05, 0.05, 0.2, 0.35]
    with serving(Script(first_s=0.5, step_s=0)) as url:
        run = drive(url, Load(due_s=iter(due)))
    assert [record.due_s for record in run.records] == due
    assert all(0 <= record.sent_s - record.due_s < 0.1 for record in run.records)
    assert min(record.end_s for record in run.records) > run.records[-1].sent_s


def test_a_load_ends_with_its_seconds_and_answers_are_waited_for() -> None:
    with serving(Script(first_s=0.3, step_s=0)) as url:
        run = drive(url, Load(due_s=(i / 50 for i in range(10_000)), seconds=0.5))
        closed = drive(url, Load(concurrency=2, seconds=0.5))
    assert 20 <= len(run.records) <= 26
    assert all(record.ok for record in (*run.records, *closed.records))
    assert run.sent_all_s == pytest.approx(0.5, abs=0.1)
    assert len(closed.records) == 4


def test_data_that_ends_ends_the_load() -> None:
    with serving(Script(first_s=0, step_s=0)) as url:
        assert len(drive(url, Load(concurrency=3), asks=10).records) == 10
        assert len(drive(url, Load(due_s=iter([0.0] * 50)), asks=10).records) == 10


@pytest.mark.parametrize("url", ["ftp://host", "127.0.0.1:8000", "http://"])
def test_a_url_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Client(Target(url, "m"), 0.0)


def test_a_key_that_no_header_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        Client(Target("http://host", "m", api_key="a\r\nx: y"), 0.0)


def test_stopping_hangs_up_and_returns() -> None:
    async def run(url: str) -> Run:
        driver = Driver(Target(url, "m"), repeat(ASK), Load(concurrency=3))
        asyncio.get_running_loop().call_later(0.2, driver.stop)
        return await asyncio.wait_for(driver.drive(), 10.0)

    with serving(Script(stall=True)) as url:
        assert [record.status for record in asyncio.run(run(url)).records] == ["cancelled"] * 3
