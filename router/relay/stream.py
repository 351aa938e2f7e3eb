"""The choices of one job while they grow: what the workers send, as deltas, to each one's end."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from afd.errors import QueueFull, RequestError, Unavailable
from afd.types import FinishReason, GenerateOutput
from router.answers.choice import Choice, Delta
from router.http.exchange import Exchange
from router.relay.admission import Admission
from router.relay.job import Job
from router.relay.placement import Placement
from router.relay.pool import Pool
from router.telemetry.metrics import Metrics


class Stream:
    """The choices of one job while they grow. Made by Relay.open."""

    def __init__(self, job: Job, metrics: Metrics, pool: Pool, admission: Admission) -> None:
        self.num_generated = 0  # tokens, over all choices
        self.num_cached = 0  # prompt tokens that the job's first choices found computed
        self._finish_reasons: list[str] = []
        self._first_token_s: float | None = None
        self._queue_s: float | None = None
        self._job = job
        self._metrics = metrics
        self._admission = admission
        self._waiting: set[str] = set()  # choices without a token yet
        self._started = time.perf_counter()
        self._placement = Placement(pool, metrics, job.terms.session)
        self._inbox = self._placement.inbox
        self._running: dict[str, Choice] = {}

    def submit(self, choices: Sequence[Choice]) -> None:
        """Raises Unavailable, QueueFull among them. What was submitted before that is running, and `cancel` ends it."""
        self._admission.enter(len(choices))
        self._waiting.update(choice.request.request_id for choice in choices)
        for choice in choices:
            self._placement.start(choice.request)
            self._running[choice.request.request_id] = choice
        self._metrics.prompt_tokens.inc(self._job.num_prompt_tokens)

    async def next(self) -> list[Delta]:
        """What came since the last call, in order; [] when every choice has ended.

        A choice whose worker is lost goes on at another, and here it only pauses. Raises RequestError or Unavailable
        when a worker refuses or fails, or no other can take over.
        """
        deltas: list[Delta] = []
        while self._running and not deltas:  # what a choice sent before it learned of its stop string is no delta
            for arrival in await self._inbox.arrivals():
                if isinstance(arrival, tuple):
                    deltas += self._accept_token(*arrival)
                elif arrival.request_id in self._running:
                    deltas += self._accept(arrival)
        return deltas

    def on_delta(self, say: Callable[[Delta], Awaitable[None] | None]) -> None:
        """From now on ordinary deltas may go straight to `say`, while `next` waits, and only the others through `next`.
        What `say` returns is awaited before anything else is given out. Not where stop strings can end a choice: what
        `say` is told never ends one."""
        if not self._job.rules.stops:
            self._inbox.shortcut = lambda request_id, token_id: self._hand_on(say, request_id, token_id)

    def _hand_on(
        self, say: Callable[[Delta], Awaitable[None] | None], request_id: str, token_id: int
    ) -> Awaitable[None] | None:
        for delta in self._accept_token(request_id, token_id):
            return say(delta)
        return None

    def cancel(self, reason: str) -> None:
        """Ends at the workers what has not ended by itself, counted as `reason` in the metrics."""
        for request_id in self._running:
            self._placement.cancel(request_id)
            self._metrics.finished(reason, time.perf_counter() - self._started)
        self._running.clear()
        self._admission.give_up(len(self._waiting))
        self._waiting.clear()

    def tell(self, exchange: Exchange) -> None:
        """What happened so far, for logs and spans."""
        sampling = self._job.sampling[0]
        exchange.answer_id, exchange.num_prompt_tokens = self._job.job_id, self._job.num_prompt_tokens
        exchange.num_generated, exchange.finish_reasons = self.num_generated, self._finish_reasons
        exchange.max_tokens, exchange.temperature = sampling.max_tokens, sampling.temperature
        exchange.queue_s = self._queue_s
        if self._first_token_s is not None:  # it counts from the request's arrival, not from the end of its body
            exchange.first_token_s = self._first_token_s + self._started - exchange.began_s

    def _accept_token(self, request_id: str, token_id: int) -> Sequence[Delta]:
        """None for a choice that has ended."""
        choice = self._running.get(request_id)
        return () if choice is None else (self._took(choice, choice.accept_token(token_id), None),)

    def _accept(self, output: GenerateOutput) -> Sequence[Delta]:
        """Nothing where the choice goes on at another worker."""
        choice = self._running[output.request_id]
        if output.finish_reason in ("error", "cancelled"):
            ending = self._placement.move(choice, output) if output.refused else output
            if ending is None:
                return ()
            del self._running[output.request_id]
            self._placement.ended(output.request_id)
            self._metrics.finished("error", time.perf_counter() - self._started)
            raise self._error(ending)
        if choice.index % self._job.n == 0:
            self.num_cached += output.cached_tokens
        if output.queue_s is not None:
            self._queue_s = max(output.queue_s, self._queue_s or 0.0)
            self._metrics.queue_time.observe(output.queue_s)
        return (self._took(choice, choice.accept(output), output.finish_reason),)

    def _error(self, output: GenerateOutput) -> RequestError | Unavailable:
        if output.client_error:
            return RequestError(output.error)
        if output.refused == "full":
            return QueueFull(output.error, retry_after_s=self._admission.retry_after_s)
        return Unavailable(output.error or "the attention worker cancelled the request")

    def _took(self, choice: Choice, delta: Delta, said: FinishReason | None) -> Delta:
        """Follows what `delta` means for its choice. `said` is how the worker said that it ends, if it did."""
        self._measure(choice, len(delta.tokens))
        if delta.finish_reason is not None:
            request_id = choice.request.request_id
            del self._running[request_id]
            if said is None:
                self._placement.cancel(request_id)  # a stop string ended it: the worker does not know
            else:
                self._placement.ended(request_id)
            self._metrics.finished(delta.finish_reason, time.perf_counter() - self._started)
            self._finish_reasons.append(delta.finish_reason)
            if choice.num_tokens > 1 and choice.first_token_at is not None and choice.last_token_at is not None:
                per_token_s = (choice.last_token_at - choice.first_token_at) / (choice.num_tokens - 1)
                self._metrics.time_per_output_token.observe(per_token_s)
        return delta

    def _measure(self, choice: Choice, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now = time.perf_counter()
        if choice.last_token_at is None:
            self._waiting.discard(choice.request.request_id)
            self._admission.leave()
            choice.first_token_at = now
            self._first_token_s = now - self._started if self._first_token_s is None else self._first_token_s
            self._metrics.time_to_first_token.observe(now - self._started)
        else:
            self._metrics.inter_token_latency.observe((now - choice.last_token_at) / num_tokens)
        choice.last_token_at = now
        self.num_generated += num_tokens
        self._metrics.generation_tokens.value += num_tokens
