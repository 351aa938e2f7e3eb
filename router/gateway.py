"""The router's parts put together, and what each endpoint answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version

import orjson
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from afd.errors import AfdError, RequestError, Unavailable
from afd.types import ClusterView, Role
from router.generation import Generation
from router.http import errors, exchange
from router.http.exchange import Exchange
from router.openai.bodies import parse, reading
from router.openai.fields import shown
from router.openai.responses import ChatShape, CompletionShape, Json, Shape, Style
from router.openai.schema import ChatRequest, CompletionRequest
from router.openai.tokenization import Tokenization
from router.relay import policy
from router.relay.job import Job
from router.relay.pool import Pool
from router.relay.relay import Relay
from router.relay.terms import Terms
from router.settings import RouterSettings
from router.telemetry import tracing
from router.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

try:
    VERSION = version("afd")
except PackageNotFoundError:
    VERSION = "0"  # run from a source tree that is not installed

_LAST_WORDS_S = 1.0  # for telling those who did not finish while draining

_Prepared = tuple[Job, Shape, bool]  # the last: streamed
_Prepare = Callable[[str, Request, bytes], Coroutine[None, None, _Prepared]]


class Gateway:
    """One router. Belongs to the event loop that serves it; `pool` is started and closed by the application."""

    def __init__(self, settings: RouterSettings, watch: Callable[[], ClusterView]) -> None:
        """Raises CheckpointError for a damaged tokenizer or chat template, ConfigError for an unknown policy, or
        where spans are wanted without their packages."""
        self.pool = Pool(
            watch,
            policy.create(settings.policy),
            deadline_s=settings.deadline_s,
            silence_s=settings.silence_s,
            connect_s=settings.connect_s,
            poll_s=settings.poll_s,
            replay_s=settings.replay_s,
            credentials=settings.credentials,
        )
        self._settings = settings
        self._metrics = Metrics(settings.usd_per_hour)
        self._relay = Relay(settings, self.pool, self._metrics)
        self._tokenization = Tokenization(self._relay.jobs, self._check_model)
        self._spans = tracing.open_spans(settings.otlp_endpoint, settings.model_name)
        self._created = int(time.time())
        self._draining = False

    @property
    def problem(self) -> str:
        """One sentence on why new requests are refused, or ""."""
        return "this server is shutting down" if self._draining else self.pool.problem

    async def close(self) -> None:
        """Sends what is left of the spans; takes at most tracing.FLUSH_S seconds."""
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)

    async def drain(self) -> None:
        """Refuses new requests, lets those in flight finish for drain_s seconds, then tells the rest."""
        self._draining = True
        try:
            await asyncio.wait_for(self._relay.wait_idle(), self._settings.drain_s)
        except asyncio.TimeoutError:
            self.pool.fail_all("this server is shutting down and could not finish the answer in time")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._relay.wait_idle(), _LAST_WORDS_S)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, "chat", f"chatcmpl-{exchange.of(request.scope).uid}", self._chat)

    async def completions(self, request: Request) -> Response:
        job_id = f"cmpl-{exchange.of(request.scope).uid}"
        return await self._generate(request, "text_completion", job_id, self._completion)

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, model_id: str) -> Response:
        try:
            self._check_model(model_id)
        except RequestError as error:
            return errors.response(error)
        return _json(self._model_card())

    async def health(self) -> Response:
        if self.problem:
            return errors.response(Unavailable(self.problem))
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """200 only while a new request would be taken: some worker can have it, and this server does not drain."""
        return await self.health()

    async def version(self) -> Response:
        return _json({"version": VERSION})

    async def tokenize(self, request: Request) -> Response:
        return await self._answer(request, self._tokenization.tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._answer(request, self._tokenization.detokenize)

    async def _answer(self, request: Request, answer: Callable[[bytes], Coroutine[None, None, Json]]) -> Response:
        try:
            return _json(await answer(await self._body(request)))
        except AfdError as error:
            return errors.response(error)

    def ended(self, ended: Exchange) -> None:
        """Every request, once it is over."""
        if ended.status >= HTTPStatus.BAD_REQUEST:
            self.refused(ended.status)
        if self._spans is not None and ended.answer_id:
            self._spans.record(ended)

    def refused(self, status: int) -> None:
        """Every answer that is an error, once. Where a request could not be read as HTTP, there is no exchange."""
        self._metrics.http_errors.labels(str(status)).inc()

    def show(self, more: Collector) -> None:
        """Adds to what `metrics` answers."""
        self._metrics.add(more)

    async def metrics(self) -> Response:
        await self.pool.refresh()
        statuses = [member.status for member in self.pool.members if member.status is not None]
        text = self._metrics.render(statuses, self.pool.view.workers)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self) -> Response:
        """The cluster as this router sees it; what `afd status` prints."""
        return _json(await self.seen())

    async def seen(self) -> Json:
        """What `status` answers."""
        await self.pool.refresh()
        view = self.pool.view
        statuses = {member.worker.rank: member.status for member in self.pool.members}
        workers: list[Json] = []
        for worker in view.workers:
            status = statuses.get(worker.rank) if worker.role is Role.ATTENTION else None
            counters = dict(worker.counters) or None if worker.role is Role.FFN else None
            seen = asdict(replace(worker, totals=None, counters={}))
            del seen["totals"], seen["counters"]
            workers.append(seen | {"status": counters if status is None else asdict(status)})
        head = {"epoch": view.epoch, "model": view.model, "topology": view.topology, "problem": self.problem}
        return head | {"workers": workers}

    def counted(self) -> Json:
        """What this router has counted since it started, for those who watch it change."""
        return self._metrics.counted()

    async def _generate(self, request: Request, operation: str, job_id: str, prepare: _Prepare) -> Response:
        ours = exchange.of(request.scope)
        ours.operation, ours.answer_id = operation, job_id
        try:
            if self._draining:
                raise Unavailable(self.problem)
            raw = await self._body(request)
            self._relay.admission.check()  # before work is spent on a request that will be refused
            job, shape, stream = await prepare(job_id, request, raw)
            ours.streamed = stream
            return Generation(self._relay, self._metrics, job, shape, stream=stream)
        except ClientDisconnect:
            raise
        except Exception as error:
            if not isinstance(error, AfdError):
                log.exception("%s failed", job_id)
            ours.error = type(error).__name__
            return errors.response(error)

    async def _chat(self, job_id: str, request: Request, raw: bytes) -> _Prepared:
        body = await reading(lambda: parse(ChatRequest, raw), raw)
        self._check_model(body.model)
        terms = Terms.read(body, request.headers, self._settings.request_timeout_s)
        job = replace(await self._relay.jobs.chat(job_id, body, len(raw)), terms=terms)
        return job, ChatShape(job, self._answer_style(body)), bool(body.stream)

    async def _completion(self, job_id: str, request: Request, raw: bytes) -> _Prepared:
        body = await reading(lambda: parse(CompletionRequest, raw), raw)
        self._check_model(body.model)
        terms = Terms.read(body, request.headers, self._settings.request_timeout_s)
        job = replace(await self._relay.jobs.completion(job_id, body, len(raw)), terms=terms)
        return job, CompletionShape(job, self._answer_style(body)), bool(body.stream)

    def _answer_style(self, body: ChatRequest | CompletionRequest) -> Style:
        return Style(
            model=self._settings.model_name,
            created=int(time.time()),
            tokenizer=self._relay.jobs.tokenizer,
            num_logprobs=body.num_logprobs,
            token_ids=bool(body.return_token_ids),
            usage_chunk=body.include_usage,
            usage_in_chunks=body.usage_in_chunks,
            ids_for_tokens=bool(body.return_tokens_as_token_ids),
            fingerprint=self._settings.fingerprint,
        )

    async def _body(self, request: Request) -> bytes:
        return await body_of(request, self._settings.max_body_bytes)

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            message = f"model {shown(name)} is not served here; this server has {self._settings.model_name!r}"
            raise RequestError(message, param="model", code="model_not_found", status=404)

    def _model_card(self) -> Json:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "afd",
            "max_model_len": self._relay.jobs.max_context,
        }


async def body_of(request: Request, max_bytes: int) -> bytes:
    """Raises RequestError as soon as it is clear that the body is too long."""
    message = f"the request body is longer than {max_bytes} bytes (router.max_body_mib)"
    too_long = RequestError(message, code="body_too_large", status=413)
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > max_bytes:
        raise too_long
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > max_bytes:
            raise too_long
    return bytes(raw)


def _json(value: Json) -> Response:
    return errors.json_response(200, orjson.dumps(value))
