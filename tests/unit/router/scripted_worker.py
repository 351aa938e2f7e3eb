"""A real attention service over gRPC whose engine follows a script, and a real router on a free port, for the tests."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

import grpc
import grpc.aio
import httpx
from openai import OpenAI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from afd.errors import RequestError
from afd.rpc.attention_pb2_grpc import AttentionServicer, add_AttentionServicer_to_server
from afd.rpc.convert import AttentionStatus, request_from_proto, status_to_proto
from afd.rpc.steps import StepWriter
from afd.types import ClusterView, GenerateOutput, GenerateRequest, Role, SampledToken, WorkerView
from router.app import RouterSettings, Server, bind
from router.gateway import Gateway

MODEL = "tiny"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EOS = "<|im_end|>"

Script = Callable[[GenerateRequest], AsyncIterator[GenerateOutput]]


def build_tokenizer(path: Path) -> Path:
    """A byte-level BPE of 256 bytes, a few merges and three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", EOS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the capital of France is Paris, the city of light"] * 4, trainer)
    file = path / "tokenizer.json"
    tokenizer.save(str(file))
    return file


class Say:
    """A script: these tokens, one a step, then `finish`. Logprobs are -0.5 for the token and fall from there."""

    def __init__(self, token_ids: Sequence[int], finish: str = "stop", stop_token_id: int | None = None) -> None:
        self.token_ids, self.finish, self.stop_token_id = list(token_ids), finish, stop_token_id

    async def __call__(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        ids = self.token_ids[: request.sampling.max_tokens]
        for position, token_id in enumerate(ids):
            last = position == len(ids) - 1
            finish = None if not last else "length" if len(ids) < len(self.token_ids) else self.finish
            logprobs = request.sampling.logprobs
            token = SampledToken(token_id)
            if logprobs is not None:
                token = SampledToken(token_id, -0.5, tuple((token_id + i, -0.5 - i) for i in range(logprobs)))
            stop = self.stop_token_id if finish == "stop" else None
            yield GenerateOutput(request.request_id, (token,), finish, stop)


class Tape:
    """A script: these tokens, one a step, from wherever the request stands, the token at place i with logprob -i. An
    answer that comes to `until` tokens here waits there for `released`."""

    def __init__(self, token_ids: Sequence[int], until: int | None = None, finish: str = "stop") -> None:
        self.token_ids, self.until, self.finish = list(token_ids), until, finish
        self.released = threading.Event()

    async def __call__(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        ids, begin = self.token_ids[: request.sampling.max_tokens], len(request.generated_token_ids)
        assert tuple(ids[:begin]) == request.generated_token_ids, "not the answer that it began with"
        for place, token_id in enumerate(ids[begin:], begin):
            while place == self.until and not self.released.is_set():
                await asyncio.sleep(0.005)
            finish = None if place < len(ids) - 1 else "length" if len(ids) < len(self.token_ids) else self.finish
            logprob = None if request.sampling.logprobs is None else -float(place)
            yield GenerateOutput(request.request_id, (SampledToken(token_id, logprob),), finish)


async def refuse(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    """A script: the engine finds the request at fault."""
    yield GenerateOutput(request.request_id, (), "error", error="temperature is odd", client_error=True)


async def endless(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    """A script: one token after the other until cancelled."""
    while True:
        yield GenerateOutput(request.request_id, (SampledToken(request.prompt_token_ids[-1]),))
        await asyncio.sleep(0.002)


async def silent(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
    """A script: nothing, ever."""
    await asyncio.Event().wait()
    yield GenerateOutput(request.request_id)


@cache
def _workers_loop() -> asyncio.AbstractEventLoop:
    """One loop for all workers of the session: grpc.aio complains of late events for loops that are closed."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


class ScriptedWorker(AttentionServicer):
    """Runs on a thread of its own. `submitted` and `cancelled` are queues a test can wait on."""

    def __init__(self, script: Script, attention_rank: int = 0) -> None:
        self.script = script
        self.attention_rank = attention_rank
        self.submitted: queue.Queue[GenerateRequest] = queue.Queue()
        self.cancelled: queue.Queue[str] = queue.Queue()
        self.streams_ended: queue.Queue[None] = queue.Queue()
        self.steps = 0
        self.max_context = 0  # in Status; 0: does not say
        self.state = "ready"
        self.busy_tokens = 0  # what it computes for others
        self.answers_status = True
        self.on_status: Callable[[], None] = lambda: None
        self.steps_on_status = 0  # how many steps every Status call finds done since the last
        self._do(self._start())

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, _workers_loop()).result(10)

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        add_AttentionServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    def die(self) -> None:
        """As a killed process: streams break at once."""
        self._do(self._server.stop(None))

    def view(self, state="ready", message: str = "") -> WorkerView:
        return WorkerView(Role.ATTENTION, self.attention_rank, state, self.address, pid=1, message=message)

    async def Serve(self, request_iterator, context):
        outputs: asyncio.Queue[GenerateOutput | None] = asyncio.Queue()
        writer = StepWriter()
        playing: dict[str, asyncio.Task[None]] = {}

        async def play(request: GenerateRequest) -> None:
            async for output in self.script(request):
                self.steps += 1
                await outputs.put(output)

        async def read() -> None:
            async for message in request_iterator:
                if message.WhichOneof("kind") == "submit":
                    try:
                        request = request_from_proto(message.submit)
                    except RequestError as error:
                        said = GenerateOutput(
                            message.submit.request_id, (), "error", error=str(error), client_error=True
                        )
                        await outputs.put(said)
                        continue
                    writer.opened(request.request_id, message.submit.handle)
                    playing[request.request_id] = asyncio.create_task(play(request))
                    self.submitted.put(request)
                else:
                    if message.cancel.request_id in playing:
                        playing[message.cancel.request_id].cancel()
                    self.cancelled.put(message.cancel.request_id)
            await outputs.put(None)  # the router ends the stream

        reader = asyncio.create_task(read())
        try:
            while True:
                batch = [await outputs.get()]
                while not outputs.empty():
                    batch.append(outputs.get_nowait())
                if None in batch:
                    return
                yield writer.write(batch)
        finally:
            for task in (reader, *playing.values()):
                task.cancel()
            self.streams_ended.put(None)

    async def Status(self, request, context):
        while not self.answers_status:
            await asyncio.sleep(0.01)
        self.on_status()
        self.steps += self.steps_on_status
        return status_to_proto(
            AttentionStatus(
                self.attention_rank,
                self.state,
                running=1,
                waiting=2,
                blocks_total=64,
                blocks_used=3,
                steps=self.steps,
                max_context=self.max_context,
                prefix_queries=90,
                prefix_hits=60,
                running_tokens=self.busy_tokens,
                free_tokens=1024,
            )
        )


class RunningRouter:
    """A Server on a thread; `view` is what the controller says, and may be replaced at any time."""

    def __init__(self, settings: RouterSettings, view: ClusterView) -> None:
        self.view = view
        ready: queue.Queue[str] = queue.Queue()
        self.server = Server(settings, lambda: self.view, bind("127.0.0.1", 0), on_ready=ready.put)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        self.url = ready.get(timeout=15)
        self.http = httpx.Client(base_url=self.url, timeout=15, trust_env=False, verify=False)

    @cached_property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=15)

    @property
    def gateway(self) -> Gateway:
        return self.server._app.state.gateway

    def join(self) -> None:
        self._thread.join(15)
        assert not self._thread.is_alive(), "the server did not stop"

    def close(self) -> None:
        if "openai" in self.__dict__:
            self.openai.close()
        self.http.close()
        self.server.stop()
        self.join()


def cluster(*workers: WorkerView) -> ClusterView:
    return ClusterView(epoch=7, model=MODEL, topology="1A1F", workers=workers)
