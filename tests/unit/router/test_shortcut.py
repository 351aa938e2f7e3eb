"""An ordinary token goes from the worker's message to the client's socket without a task switch. The way through tasks
is its plain twin: what the client reads is the same."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.rpc.attention_client import Inbox
from afd.types import GenerateOutput, SampledToken, SamplingParams
from router.answers.choice import Delta, TextRules
from router.generation import at_once
from router.openai.responses import ChatShape, CompletionShape, Style
from router.relay.admission import Admission
from router.relay.job import Job
from router.relay.stream import Stream
from router.telemetry.counts import Count, Spread
from router.telemetry.metrics import Metrics


class OneWorker:
    """Stands for pool and client: the test plays the worker."""

    def submit(self, request, inbox, session="", tried=()):
        self.inbox = inbox
        return self

    def cancel(self, request_id):
        pass


def opened(tokenizer, **rules):
    worker, job = OneWorker(), Job("j", ((5,),), (SamplingParams(),), n=1, rules=TextRules(**rules))
    stream = Stream(job, Metrics(), worker, Admission(8))
    stream.submit(job.choices(tokenizer))
    return worker, stream


async def parked(work):
    """`work` as a task that has come to its first wait."""
    task = asyncio.create_task(work)
    for _ in range(3):
        await asyncio.sleep(0)
    return task


def test_a_token_is_said_at_once_while_the_reader_waits_and_goes_through_it_otherwise(tokenizer):
    async def play():
        worker, stream = opened(tokenizer)
        said = []
        stream.on_delta(said.append)
        worker.inbox.put_token("j-0", 70)  # nobody waits yet
        (first,) = await stream.next()
        reader = await parked(stream.next())
        for token_id in (71, 72):
            worker.inbox.put_token("j-0", token_id)
        assert not reader.done()
        worker.inbox.put(GenerateOutput("j-0", (SampledToken(73),), "length"))
        worker.inbox.put_token("j-0", 74)  # after the end, and not to overtake it
        (last,) = await reader
        return [first, *said, last], stream.num_generated

    deltas, num_generated = asyncio.run(play())
    assert [token.token_id for delta in deltas for token in delta.tokens] == [70, 71, 72, 73]
    assert "".join(delta.text for delta in deltas) == tokenizer.decode([70, 71, 72, 73])
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]
    assert num_generated == 4


def test_what_cannot_be_sent_at_once_is_awaited_before_anything_else_is_given_out(tokenizer):
    async def play():
        worker, stream = opened(tokenizer)
        sent, room = [], asyncio.Event()

        async def send(delta):
            await room.wait()
            sent.append(delta.tokens[0].token_id)

        stream.on_delta(lambda delta: at_once(send(delta)))
        reader = await parked(stream.next())
        for token_id in (70, 71):
            worker.inbox.put_token("j-0", token_id)
        for _ in range(3):
            await asyncio.sleep(0)
        assert not reader.done()
        assert sent == []
        room.set()
        (delta,) = await reader
        return sent, delta.tokens[0].token_id

    assert asyncio.run(play()) == ([70], 71)


def test_what_fails_in_the_shortcut_is_raised_to_the_reader_not_to_the_connection():
    async def play():
        inbox = Inbox()

        def fail(request_id, token_id):
            raise LookupError(request_id, token_id)

        inbox.shortcut = fail
        reader = await parked(inbox.arrivals())
        inbox.put_token("a", 1)
        with pytest.raises(LookupError):
            await reader

    asyncio.run(play())


def test_where_stop_strings_may_end_a_choice_nothing_is_said_past_the_reader(tokenizer):
    async def play():
        worker, stream = opened(tokenizer, stops=("x",))
        stream.on_delta(lambda delta: pytest.fail("said past the reader"))
        reader = await parked(stream.next())
        worker.inbox.put_token("j-0", 70)
        return await reader

    assert len(asyncio.run(play())) == 1


def test_a_reader_of_outputs_gets_ordinary_tokens_as_outputs():
    async def play():
        inbox = Inbox()
        inbox.put_token("a", 1)
        inbox.put(GenerateOutput("a", (), "length"))
        return await inbox.take()

    assert asyncio.run(play()) == [GenerateOutput("a", (SampledToken(1),)), GenerateOutput("a", (), "length")]


@given(
    text=st.text(),
    ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    model=st.text(max_size=9) | st.just('"text"[]"content"'),
    token_ids=st.booleans(),
    usage=st.booleans(),
    kind=st.sampled_from([ChatShape, CompletionShape]),
)
def test_a_chunk_written_around_its_text_is_the_chunk_written_whole(
    tokenizer, text, ids, model, token_ids, usage, kind
):
    shape = kind(Job("j", ((5,),), (SamplingParams(),), n=3), Style(model, 1, tokenizer, None, token_ids, usage))
    delta = Delta(2, text, [SampledToken(token_id) for token_id in ids])
    assert (shape._ordinary(delta) != b"") == (text != "")
    expected = shape._chunk(shape._delta(delta)) if shape._speaks(delta) else b""
    assert shape.chunks([delta]) == expected


def test_counts_say_what_prometheus_own_would():
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

    ours, theirs = CollectorRegistry(), CollectorRegistry()
    count, spread = Count("c", "Count.", ours), Spread("s", "Spread.", (0.5, 1.0, 10.0), ours)
    counter = Counter("c", "Count.", registry=theirs)
    histogram = Histogram("s", "Spread.", buckets=(0.5, 1.0, 10.0), registry=theirs)
    for value in (0.1, 0.5, 0.7, 1.0, 9.0, 11.0):
        count.value += 2
        counter.inc(2)
        spread.observe(value)
        histogram.observe(value)

    def lines(registry):
        return {line for line in generate_latest(registry).decode().splitlines() if "_created" not in line}

    assert lines(ours) == lines(theirs)
