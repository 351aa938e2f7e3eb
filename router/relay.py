"""READ FIRST: one request's way through the router.

`Relay.chat_job` and `completion_job` turn a checked request into a Job: prompts as token ids, and how to continue them.
`Relay.open` sends one worker request for every prompt and choice, and gives a Stream; `Stream.next` gives what came
since: tokens at once, text once no later token can change it (a character's missing bytes, a stop string begun).
Leaving the stream, for whatever reason, cancels at the workers what has not ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from afd.errors import DeadlineExceeded, QueueFull, RequestError, TransportError, Unavailable
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import FinishReason, GenerateOutput, GenerateRequest, SamplingParams
from router import conversation
from router.admission import Admission
from router.answer import Answers, Plan
from router.chat import ChatTemplate
from router.choice import Choice, Delta, TextRules
from router.deadline import deadline
from router.exchange import Exchange
from router.metrics import Metrics
from router.pool import Pool
from router.reasoning import registry as reasoning
from router.sampling import SamplingDefaults
from router.schema import ChatPrompt, ChatRequest, CompletionRequest, Request
from router.settings import RouterSettings
from router.terms import Terms
from router.tokenizer import Tokenizer, off_loop
from router.tools import registry as tool_formats

_COMPLETION_TOKENS = 16  # what /v1/completions generates when the client does not say, as at OpenAI


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate: `n` choices for each prompt. Choice j of prompt i has index i * n + j."""

    job_id: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingParams, ...]  # one per prompt: max_tokens may depend on its length
    n: int
    rules: TextRules = field(default_factory=TextRules)
    terms: Terms = field(default_factory=Terms)
    best: int | None = None  # of the n choices of a prompt, so many are answers (router.best); None: all
    echoes: tuple[str, ...] = ()  # per prompt, the text that its answers begin with

    @property
    def num_kept(self) -> int:
        return self.n if self.best is None else self.best

    grammar: str = ""  # of every choice

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def choices(self, tokenizer: Tokenizer) -> list[Choice]:
        """Fresh choices, in the order of their index. A seed is offset by the choice's place among the n of a prompt,
        so that choices differ and equal prompts have equal answers."""
        return [
            Choice(i * self.n + j, self._worker_request(i, j), self.rules, tokenizer)
            for i in range(len(self.prompts))
            for j in range(self.n)
        ]

    def _worker_request(self, i: int, j: int) -> GenerateRequest:
        sampling = self.sampling[i]
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + j) % 2**64)
        request_id = f"{self.job_id}-{i * self.n + j}"
        return GenerateRequest(
            request_id, self.prompts[i], sampling, self.terms.priority, self.terms.cache_salt, self.grammar
        )


_Running = tuple[Choice, AttentionClient]


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
        self._pool = pool
        self._admission = admission
        self._waiting: set[str] = set()  # choices without a token yet
        self._tried: dict[str, list[AttentionClient]] = {}  # the workers that a choice has lost or was refused by
        self._started = time.perf_counter()
        self._inbox = Inbox()
        self._running: dict[str, _Running] = {}

    def submit(self, choices: Sequence[Choice]) -> None:
        """Raises Unavailable, QueueFull among them. What was submitted before that is running, and `cancel` ends it."""
        self._admission.enter(len(choices))
        self._waiting.update(choice.request.request_id for choice in choices)
        for choice in choices:
            client = self._pool.submit(choice.request, self._inbox, self._job.terms.session)
            self._running[choice.request.request_id] = (choice, client)
        self._metrics.prompt_tokens.inc(self._job.num_prompt_tokens)

    async def next(self) -> list[Delta]:
        """What came since the last call, in order; [] when every choice has ended.

        Raises RequestError or Unavailable when a worker refuses, fails or is lost.
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
        for request_id, (_, client) in self._running.items():
            client.cancel(request_id)
            self._metrics.finished(reason, time.perf_counter() - self._started)
        self._running.clear()
        for request_id in list(self._waiting):
            self._waits_no_more(request_id)

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
        running = self._running.get(request_id)
        return () if running is None else (self._took(request_id, running, running[0].accept_token(token_id), None),)

    def _accept(self, output: GenerateOutput) -> Sequence[Delta]:
        """Nothing where the choice goes on at another worker."""
        choice, client = running = self._running[output.request_id]
        if output.finish_reason in ("error", "cancelled"):
            if output.refused and self._try_another(choice, client):
                return ()
            del self._running[output.request_id]
            self._metrics.finished("error", time.perf_counter() - self._started)
            raise self._error(output, client)
        if choice.index % self._job.n == 0:
            self.num_cached += output.cached_tokens
        if output.queue_s is not None:
            self._queue_s = max(output.queue_s, self._queue_s or 0.0)
            self._metrics.queue_time.observe(output.queue_s)
        return (self._took(output.request_id, running, choice.accept(output), output.finish_reason),)

    def _error(self, output: GenerateOutput, client: AttentionClient) -> RequestError | Unavailable:
        if output.client_error:
            return RequestError(output.error)
        if output.refused == "full":
            return QueueFull(output.error, retry_after_s=self._admission.retry_after_s)
        return Unavailable(output.error or f"{client.peer} cancelled the request")

    def _try_another(self, choice: Choice, client: AttentionClient) -> bool:
        """Sends a choice that has no token yet to a worker that has not had it; False where that cannot be."""
        request_id = choice.request.request_id
        if request_id not in self._waiting:
            return False
        tried = self._tried.setdefault(request_id, [])
        tried.append(client)
        try:
            another = self._pool.submit(choice.request, self._inbox, self._job.terms.session, tried)
        except (Unavailable, TransportError):
            return False  # what the first one said says more
        self._running[request_id] = (choice, another)
        self._metrics.retries.inc()
        return True

    def _waits_no_more(self, request_id: str) -> None:
        self._waiting.discard(request_id)
        self._admission.leave()

    def _took(self, request_id: str, running: _Running, delta: Delta, said: FinishReason | None) -> Delta:
        """Follows what `delta` means for its choice. `said` is how the worker said that it ends, if it did."""
        choice, client = running
        self._measure(choice, len(delta.tokens))
        if delta.finish_reason is not None:
            del self._running[request_id]
            if said is None:
                client.cancel(request_id)  # a stop string ended it: the worker does not know
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
            self._waits_no_more(choice.request.request_id)
            choice.first_token_at = now
            self._first_token_s = now - self._started if self._first_token_s is None else self._first_token_s
            self._metrics.time_to_first_token.observe(now - self._started)
        else:
            self._metrics.inter_token_latency.observe((now - choice.last_token_at) / num_tokens)
        choice.last_token_at = now
        self.num_generated += num_tokens
        self._metrics.generation_tokens.value += num_tokens


class Relay:
    """Turns requests into jobs and follows them. Holds nothing of a single request."""

    def __init__(self, settings: RouterSettings, pool: Pool, metrics: Metrics) -> None:
        """Raises CheckpointError when the model's tokenizer, chat template or generation config is damaged, ConfigError
        for an unknown parser."""
        self._settings = settings
        self._tokenizer = Tokenizer(settings.tokenizer_json)
        self._template = ChatTemplate(settings.tokenizer_config)
        self._answers = Answers(
            tool_formats.create(settings.tool_parser), reasoning.find(settings.reasoning_parser), self._tokenizer
        )
        self._defaults = SamplingDefaults.read(settings.generation_config)
        self._pool = pool
        self._metrics = metrics
        self.admission = Admission(settings.max_queue)
        self._num_open = 0
        self._closed_one = asyncio.Event()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def max_context(self) -> int:
        """Tokens, prompt and answer together, of the longest request served now."""
        return self._pool.max_context(self._settings.max_context)

    async def chat_job(self, job_id: str, request: ChatRequest) -> Job:
        """Raises RequestError. The answer may by default take the rest of the context."""
        text, ids = await self.chat_prompt(request)
        plan = await self._answers.chat(request, text)
        return self._job(job_id, request, [ids], "messages", self._settings.max_context, plan)

    async def chat_prompt(self, request: ChatPrompt) -> tuple[str, list[int]]:
        """What the chat template makes of the messages, as text and as token ids. Raises RequestError."""
        source = request.chat_template
        if source is not None and not self._settings.trust_request_chat_template:
            raise RequestError(
                "chat_template is not taken from requests by this server (router.trust_request_chat_template)",
                param="chat_template",
                code="unsupported_parameter",
            )

        if request.continue_final_message and request.add_generation_prompt:
            message = "add_generation_prompt and continue_final_message cannot both be true"
            raise RequestError(message, param="continue_final_message")

        template = self._template if source is None else self._template.with_source(source)
        offered = [tool.for_model() for tool in request.offered_tools] if template.knows_tools else []

        def tokenize() -> tuple[str, list[int]]:
            messages = conversation.messages(request, self._answers.tools, template_knows_tools=template.knows_tools)
            variables = request.chat_template_kwargs or {}
            if request.continue_final_message:
                text = template.render_open(messages, tools=offered or None, variables=variables)
            else:
                generates = request.add_generation_prompt is not False
                text = template.render(
                    messages, add_generation_prompt=generates, tools=offered or None, variables=variables
                )
            return text, self._tokenizer.encode(text, special=bool(request.add_special_tokens))

        num_chars = sum(len(message.content) for message in request.messages) + len(str(request.offered_tools))
        return await off_loop(tokenize, num_chars)

    async def completion_job(self, job_id: str, request: CompletionRequest) -> Job:
        """Raises RequestError."""
        special = request.add_special_tokens is not False

        def token_ids(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, str):
                return self._tokenizer.encode(prompt, special=special)
            self.check_vocabulary(prompt, "prompt")
            return prompt

        prompts = await off_loop(
            lambda: [token_ids(prompt) for prompt in request.prompt], sum(map(len, request.prompt))
        )
        plan = await self._answers.completion(request)
        job = self._job(job_id, request, prompts, "prompt", _COMPLETION_TOKENS, plan)
        num_best = max(request.best_of or 0, job.n)
        job = replace(job, n=num_best, best=job.n) if num_best > job.n else job
        return replace(job, echoes=tuple(map(self._echo, request.prompt))) if request.echo else job

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, special=True)

    @asynccontextmanager
    async def open(self, job: Job) -> AsyncIterator[Stream]:
        """Starts the job. Raises Unavailable when no worker can take it, QueueFull when too many wait already, and
        DeadlineExceeded in the block when the job's time runs out."""
        stream = Stream(job, self._metrics, self._pool, self.admission)
        unfinished = "abort"
        self._num_open += 1
        try:
            with deadline(job.terms.timeout_s):
                stream.submit(job.choices(self._tokenizer))
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

    def check_vocabulary(self, ids: Iterable[int], param: str) -> None:
        """Raises RequestError for the first id that the model does not have."""
        bad = next((token for token in ids if not 0 <= token < self._settings.vocab_size), None)
        if bad is not None:
            message = (
                f"{param} holds token id {bad}; the model's vocabulary has ids 0 to {self._settings.vocab_size - 1}"
            )
            raise RequestError(message, param=param, code="invalid_token_id")

    def _job(
        self, job_id: str, request: Request, prompts: list[list[int]], param: str, default_tokens: int, plan: Plan
    ) -> Job:
        self.check_vocabulary(request.stop_token_ids or (), "stop_token_ids")
        self.check_vocabulary(request.allowed_token_ids or (), "allowed_token_ids")
        self.check_vocabulary(request.logit_bias or (), "logit_bias")
        bad_words = self._tokenizer.spellings(request.bad_words or ())
        context = self.max_context
        sampling = []
        if (wanted := request.truncate_prompt_tokens) is not None:
            prompts = [_end_of(ids, wanted, context - (request.token_limit or 1)) for ids in prompts]
        for ids in prompts:
            if not ids:
                raise RequestError(f"{param} holds no tokens", param=param, code="empty_prompt")
            limit = request.token_limit
            room = context - len(ids)
            if room < (limit or 1):
                raise RequestError(
                    f"this server's context is {context} tokens, but the prompt has {len(ids)} and "
                    f"the answer may have {limit or 'at least 1'}; shorten {param} or lower max_tokens",
                    param=param,
                    code="context_length_exceeded",
                )
            most = min(default_tokens, room) if limit is None else limit
            sampling.append(replace(self._defaults.sampling(request, most), bad_words=bad_words))
        keep_special = request.skip_special_tokens is False or plan.keep_special
        rules = TextRules(tuple(request.stop), bool(request.include_stop_str_in_output), keep_special, plan.parser)
        return Job(job_id, tuple(map(tuple, prompts)), tuple(sampling), request.n or 1, rules, grammar=plan.grammar)


def _end_of(ids: list[int], wanted: int, room: int) -> list[int]:
    """The last `wanted` tokens; -1: as many as there is room for."""
    num_kept = max(room, 0) if wanted < 0 else wanted
    return ids[max(0, len(ids) - num_kept) :]
