from __future__ import annotations

import asyncio

from afd.types import GenerateOutput, SampledToken, SamplingParams
from router.answers.choice import TextRules
from router.relay.admission import Admission
from router.relay.job import Job
from router.relay.stream import Stream
from router.telemetry.metrics import Metrics


class OneWorker:
    """Stands for pool and client: the test plays the worker."""

    def __init__(self):
        self.cancelled = []

    def submit(self, request, inbox, session="", tried=()):
        self.inbox = inbox
        return self

    def cancel(self, request_id):
        self.cancelled.append(request_id)


def test_what_a_stopped_choice_still_sends_does_not_end_the_others(tokenizer):
    """Tokens of a choice that a stop string has ended may be in the inbox already; a batch of only those looked like
    the end of the answer."""

    async def play():
        worker, job = OneWorker(), Job("j", ((5,),), (SamplingParams(),), n=2, rules=TextRules(stops=("a",)))
        stream = Stream(job, Metrics(), worker, Admission(8))
        stream.submit(job.choices(tokenizer))
        a, b = (SampledToken(*tokenizer.encode(text, special=False)) for text in "ab")
        worker.inbox.put(GenerateOutput("j-0", (a,)))
        first = await stream.next()
        worker.inbox.put(GenerateOutput("j-0", (b,)))
        asyncio.get_running_loop().call_soon(worker.inbox.put, GenerateOutput("j-1", (b,), "length"))
        second = await stream.next()
        return worker.cancelled, first, second, await stream.next()

    cancelled, first, second, end = asyncio.run(play())
    assert cancelled == ["j-0"]
    assert [(delta.index, delta.finish_reason, delta.stop_reason) for delta in first] == [(0, "stop", "a")]
    assert [(delta.index, delta.text, delta.finish_reason) for delta in second] == [(1, "b", "length")]
    assert end == []
