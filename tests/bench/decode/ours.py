"""1A1F as it is served: over HTTP, and the same two workers without router and HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from afd.cluster.controller import Cluster
from afd.cluster.launch import open_cluster
from afd.config import Deployment
from afd.credentials import Credentials, for_run
from afd.pipeline.analysis import picture
from afd.pipeline.summary import as_json
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import GenerateRequest, Role, SamplingParams
from tests.bench.decode.workload import BenchError, Prompts, Run
from tests.system.serving import Serving, serving

START_S = 300.0
CONNECT_S = 10.0
LOOK_S = 0.02  # how often a watched run is looked at
MAX_EVENTS = 120_000
TOKEN_IDS = re.compile(rb'"token_ids":\[([0-9,]+)\]')

Generate = Callable[[Prompts, int, list[list[float]]], Awaitable[None]]


class _Ours:
    """What both have in common: runs are coroutines that note when each stream's tokens come."""

    def __init__(self, name: str, generate: Generate, look: Callable[[float], dict[str, object]]) -> None:
        self.name = name
        self._generate = generate
        self._look = look

    def run(self, prompts: Prompts, tokens: int) -> Run:
        """See Candidate."""
        arrivals: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()
        asyncio.run(self._whole(prompts, tokens, arrivals))
        return Run(time.perf_counter() - began, arrivals)

    def watch(self, prompts: Prompts, tokens: int) -> dict[str, object]:
        """See Watched."""
        return asyncio.run(self._watch(prompts, tokens))

    async def _whole(self, prompts: Prompts, tokens: int, arrivals: list[list[float]]) -> None:
        await self._generate(prompts, tokens, arrivals)
        short = {len(times) for times in arrivals} - {tokens}
        if short:
            raise BenchError(f"{self.name}: {tokens} tokens were asked for, a stream got {min(short)}")

    async def _watch(self, prompts: Prompts, tokens: int) -> dict[str, object]:
        arrivals: list[list[float]] = [[] for _ in prompts]
        running = asyncio.create_task(self._whole(prompts, tokens, arrivals))
        while not running.done() and not all(arrivals):
            await asyncio.sleep(LOOK_S)
        began = time.perf_counter()
        while not running.done() and max(map(len, arrivals)) < tokens - 2:
            await asyncio.sleep(LOOK_S)
        found = await asyncio.to_thread(self._look, time.perf_counter() - began)
        await running
        return found


class Http(_Ours):
    """`afd serve`, asked by concurrent streams of this process."""

    def __init__(self, name: str, server: Serving, model: str) -> None:
        super().__init__(name, self._streams, self._summary)
        self._server = server
        self._model = model

    def pids(self) -> list[int]:
        """See Candidate."""
        return [self._server.process.pid]

    async def _streams(self, prompts: Prompts, tokens: int, arrivals: list[list[float]]) -> None:
        address = urlsplit(self._server.url)
        host, port = address.hostname or "", address.port or 80
        loop = asyncio.get_running_loop()
        streams = [_Stream(self._request(prompts[i], tokens), arrivals[i]) for i in range(len(prompts))]
        await asyncio.gather(*(loop.create_connection(s.itself, host, port) for s in streams))
        await asyncio.gather(*(stream.ended for stream in streams))

    def _request(self, prompt: object, tokens: int) -> bytes:
        asked = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
        lines = ("POST /v1/completions HTTP/1.1", "Host: bench", "Content-Type: application/json", "Connection: close")
        return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body

    def _summary(self, seconds: float) -> dict[str, object]:
        url = f"{self._server.url}/debug/timeline?format=summary&seconds={max(seconds, 0.1):.3f}"
        with urllib.request.urlopen(url, timeout=60.0) as response:
            return dict(json.load(response))


class _Stream(asyncio.Protocol):
    """One request on a connection of its own. It shares the cores with what it measures, so it does no more than count
    tokens in what arrives."""

    def __init__(self, request: bytes, arrivals: list[float]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._arrivals = arrivals
        self._head = b""
        self._rest = b""

    def itself(self) -> _Stream:
        """What create_connection asks for."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self._rest + data
        self._head = self._head or data[:400]
        whole = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0  # events end with an empty line
        for ids in TOKEN_IDS.findall(data, 0, whole):
            self._arrivals += [now] * (ids.count(b",") + 1)
        self._rest = data[whole:]
        if b"[DONE]" in data and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            said = (self._head + self._rest[-200:]).decode(errors="replace")
            self.ended.set_exception(BenchError(f"a stream broke off ({error or 'closed'}): {said}"))


class Engine(_Ours):
    """An attention and an FFN worker, asked through the attention worker's gRPC stream."""

    def __init__(self, name: str, cluster: Cluster, credentials: Credentials) -> None:
        super().__init__(name, self._stream, self._summary)
        self._cluster = cluster
        self._credentials = credentials

    def pids(self) -> list[int]:
        """See Candidate."""
        return [worker.pid for worker in self._cluster.view().workers if worker.pid]

    async def _stream(self, prompts: Prompts, tokens: int, arrivals: list[list[float]]) -> None:
        (address,) = [w.address for w in self._cluster.view().workers if w.role is Role.ATTENTION]
        client = await AttentionClient.connect(
            address, peer="attention worker 0", deadline_s=CONNECT_S, credentials=self._credentials
        )
        inbox, left = Inbox(), len(prompts)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        try:
            for i, prompt in enumerate(prompts):
                client.submit(GenerateRequest(str(i), tuple(prompt), params), inbox)
            while left:
                outputs, now = await inbox.take(), time.perf_counter()
                for output in outputs:
                    arrivals[int(output.request_id)] += [now] * len(output.tokens)
                    left -= output.finish_reason is not None
                    if output.finish_reason == "error":
                        raise BenchError(f"{self.name}: {output.error}")
        finally:
            await client.close()

    def _summary(self, seconds: float) -> dict[str, object]:
        return as_json(picture(self._cluster.timelines(seconds, MAX_EVENTS), seconds))


@contextmanager
def http(name: str, deployment: Deployment, folder: Path) -> Iterator[Http]:
    """`folder` is for the deployment file."""
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.yaml"
    path.write_text(yaml.safe_dump(deployment.model_dump(mode="json")))
    with serving(deployment.model, str(path), seconds=START_S) as server:
        yield Http(name, server, deployment.model)


@contextmanager
def engine(name: str, deployment: Deployment) -> Iterator[Engine]:
    credentials = for_run(deployment)
    with open_cluster(deployment, credentials=credentials) as cluster:
        if not cluster.wait_ready(START_S):
            raise BenchError(f"{name}: the workers were not ready within {START_S:g} s")
        yield Engine(name, cluster, credentials)
