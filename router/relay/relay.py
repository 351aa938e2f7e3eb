"""READ FIRST: one request's way through the router.

`Relay.jobs` (router.relay.jobs) turns a checked request into a Job: prompts as token ids, and how to continue them.
`Relay.open` sends one worker request for every prompt and choice, and gives a Stream (router.relay.stream);
`Stream.next` gives what came since: tokens at once, text once no later token can change it (a character's missing
bytes, a stop string begun). What loses its worker goes on at another (router.relay.placement), and the stream only
pauses. Leaving it, for whatever reason, cancels at the workers what has not ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from afd.errors import DeadlineExceeded
from router.relay.admission import Admission
from router.relay.deadline import deadline
from router.relay.job import Job
from router.relay.jobs import Jobs
from router.relay.pool import Pool
from router.relay.stream import Stream
from router.settings import RouterSettings
from router.telemetry.metrics import Metrics


class Relay:
    """Turns requests into jobs and follows them. Holds nothing of a single request."""

    def __init__(self, settings: RouterSettings, pool: Pool, metrics: Metrics) -> None:
        """Raises CheckpointError and ConfigError as Jobs does."""
        self.jobs = Jobs(settings, pool)
        self.admission = Admission(settings.max_queue)
        self._pool = pool
        self._metrics = metrics
        self._num_open = 0
        self._closed_one = asyncio.Event()

    @asynccontextmanager
    async def open(self, job: Job) -> AsyncIterator[Stream]:
        """Starts the job. Raises Unavailable when no worker can take it, QueueFull when too many wait already, and
        DeadlineExceeded in the block when the job's time runs out."""
        stream = Stream(job, self._metrics, self._pool, self.admission)
        unfinished = "abort"
        self._num_open += 1
        try:
            with deadline(job.terms.timeout_s):
                stream.submit(job.choices(self.jobs.tokenizer))
                yield stream
        except DeadlineExceeded:
            unfinished = "timeout"
            raise
        except Exception:
            unfinished = "error"  # one choice failed, and with it the others
            raise
        finally:
            stream.cancel(unfinished)
            self._num_open -= 1
            self._closed_one.set()

    async def wait_idle(self) -> None:
        """Returns when no stream is open."""
        while self._num_open:
            self._closed_one.clear()
            await self._closed_one.wait()
