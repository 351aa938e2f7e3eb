"""READ FIRST: one request's way through the router.

`Relay.chat_job` and `completion_job` turn a checked request into a Job: prompts as token ids, and how to continue them.
`Relay.open` sends one worker request for every prompt and choice, and gives a Stream; `Stream.next` gives what came
since: tokens at once, text once no later token can change it (a character's missing bytes, a stop string begun).
Leaving the stream, for whatever reason, cancels at the workers what has not ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from afd.errors import RequestError, Unavailable
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import FinishReason, GenerateOutput, GenerateRequest, SamplingParams
from router import conversation
from router.answer import Answers, Plan
from router.chat import ChatTemplate
from router.choice import Choice, Delta, TextRules
from router.metrics import Metrics
from router.pool import Pool
from router.reasoning import registry as reasoning
from router.sampling import SamplingDefaults
from router.schema import ChatRequest, CompletionRequest, Request
from router.settings import RouterSettings
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
        return GenerateRequest(f"{self.job_id}-{i * self.n + j}", self.prompts[i], sampling, self.grammar)


_Running = tuple[Choice, AttentionClient]


class Stream:
    """The choices of one job while they grow. Made by Relay.open."""

    def __init__(self, job: Job, metrics: Metrics) -> None:
        self.num_generated = 0  # tokens, over all choices
        self._job = job
        self._metrics = metrics
        self._started = time.perf_counter()
        self._inbox = Inbox()
        self._running: dict[str, _Running] = {}

    def submit(self, choices: Sequence[Choice], pool: Pool) -> None:
        """Raises Unavailable. What was submitted before that is running, and `cancel` ends it."""
        for choice in choices:
            client = pool.submit(choice.request, self._inbox)
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
                    deltas.append(self._accept(arrival))
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

    def _accept_token(self, request_id: str, token_id: int) -> Sequence[Delta]:
        """None for a choice that has ended."""
        running = self._running.get(request_id)
        return () if running is None else (self._took(request_id, running, running[0].accept_token(token_id), None),)

    def _accept(self, output: GenerateOutput) -> Delta:
        choice, client = running = self._running[output.request_id]
        if output.finish_reason in ("error", "cancelled"):
            del self._running[output.request_id]
            self._metrics.finished("error", time.perf_counter() - self._started)
            if output.client_error:
                raise RequestError(output.error)
            raise Unavailable(output.error or f"{client.peer} cancelled the request")
        return self._took(output.request_id, running, choice.accept(output), output.finish_reason)

    def _took(self, request_id: str, running: _Running, delta: Delta, said: FinishReason | None) -> Delta:
        """Follows what `delta` means for its choice. `said` is how the worker said that it ends, if it did."""
        choice, client = running
        self._measure(choice, len(delta.tokens))
        if delta.finish_reason is not None:
            del self._running[request_id]
            if said is None:
                client.cancel(request_id)  # a stop string ended it: the worker does not know
            self._metrics.finished(delta.finish_reason, time.perf_counter() - self._started)
        return delta

    def _measure(self, choice: Choice, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now = time.perf_counter()
        if choice.last_token_at is None:
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

        knows_tools = self._template.knows_tools
        offered = [tool.for_model() for tool in request.offered_tools] if knows_tools else None

        def tokenize() -> tuple[str, list[int]]:
            text = self._template.render(
                conversation.messages(request, self._answers.tools, template_knows_tools=knows_tools),
                add_generation_prompt=request.add_generation_prompt is not False,
                tools=offered or None,
                variables=request.chat_template_kwargs or {},
            )
            return text, self._tokenizer.encode(text, special=bool(request.add_special_tokens))

        num_chars = sum(len(message.content) for message in request.messages) + len(str(request.offered_tools))
        text, ids = await off_loop(tokenize, num_chars)
        plan = await self._answers.chat(request, text)
        return self._job(job_id, request, [ids], "messages", self._settings.max_context, plan)

    async def completion_job(self, job_id: str, request: CompletionRequest) -> Job:
        """Raises RequestError."""
        special = request.add_special_tokens is not False

        def token_ids(prompt: str | list[int]) -> list[int]:
            if isinstance(prompt, str):
                return self._tokenizer.encode(prompt, special=special)
            self._check_vocabulary(prompt, "prompt")
            return prompt

        prompts = await off_loop(
            lambda: [token_ids(prompt) for prompt in request.prompt], sum(map(len, request.prompt))
        )
        plan = await self._answers.completion(request)
        return self._job(job_id, request, prompts, "prompt", _COMPLETION_TOKENS, plan)

    @asynccontextmanager
    async def open(self, job: Job) -> AsyncIterator[Stream]:
        """Starts the job. Raises Unavailable when no worker can take it."""
        stream = Stream(job, self._metrics)
        unfinished = "abort"
        self._num_open += 1
        try:
            stream.submit(job.choices(self._tokenizer), self._pool)
            yield stream
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

    def _check_vocabulary(self, ids: list[int], param: str) -> None:
        bad = next((token for token in ids if not 0 <= token < self._settings.vocab_size), None)
        if bad is not None:
            message = (
                f"{param} holds token id {bad}; the model's vocabulary has ids 0 to {self._settings.vocab_size - 1}"
            )
            raise RequestError(message, param=param, code="invalid_token_id")

    def _job(
        self, job_id: str, request: Request, prompts: list[list[int]], param: str, default_tokens: int, plan: Plan
    ) -> Job:
        self._check_vocabulary(request.stop_token_ids or [], "stop_token_ids")
        context = self.max_context
        sampling = []
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
            sampling.append(self._defaults.sampling(request, min(default_tokens, room) if limit is None else limit))
        keep_special = request.skip_special_tokens is False or plan.keep_special
        rules = TextRules(tuple(request.stop), bool(request.include_stop_str_in_output), keep_special, plan.parser)
        return Job(job_id, tuple(map(tuple, prompts)), tuple(sampling), request.n or 1, rules, plan.grammar)
