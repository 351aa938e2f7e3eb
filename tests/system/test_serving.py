"""The whole system through its front door, on a small random model and plain processes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import torch

from afd import spec as specs
from afd.models import registry
from afd.weights import dummy
from tests import rig, tiny
from tests.system.serving import Serving, serving, until

MODEL = "tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    file = tmp_path_factory.mktemp("deployment") / "small.yaml"
    file.write_text("attention:\n  kv_cache_gib: 0.008\n")  # so little that the prefix cache is soon full
    with serving(model, str(file), "--backend", "local", "--topology", "2A1F", "--dtype", "fp32") as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as c:
        yield c


@pytest.fixture(scope="module")
def oracle() -> rig.WholeModel:
    spec = specs.from_config(tiny.CONFIG)
    return rig.whole(spec, dummy.weights(registry.family(spec.family).tensors(spec), 0))


def prompts(count: int, seed: int) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    return [([rng.randrange(256) for _ in range(rng.randint(1, 60))], rng.randint(1, 24)) for _ in range(count)]


def stream(client: openai.OpenAI, prompt: list[int], max_tokens: int) -> list[int]:
    """Token ids of a greedy streamed completion."""
    chunks = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return [t for chunk in chunks for choice in chunk.choices for t in getattr(choice, "token_ids", None) or []]


def test_64_concurrent_streams_are_all_correct(client: openai.OpenAI, oracle: rig.WholeModel) -> None:
    torch.set_num_threads(1)
    requests = prompts(64, seed=1)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda r: stream(client, *r), requests))
    assert answers == [oracle.generate(prompt, count) for prompt, count in requests]


def test_a_client_that_hangs_up_frees_its_kv_blocks(server: Serving, client: openai.OpenAI) -> None:
    until(lambda: server.blocks_used() == 0)
    chunks = client.completions.create(
        model=MODEL, prompt=[1, 2, 3], max_tokens=900, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(chunks))
    assert server.blocks_used() > 0
    chunks.close()
    # 900 tokens take seconds; a step takes milliseconds.
    until(lambda: server.blocks_used() == 0, seconds=2.0)


def test_2000_requests_leave_no_block_in_use_and_no_memory_behind(server: Serving, client: openai.OpenAI) -> None:
    def load(count: int, seed: int) -> None:
        def one(request: tuple[list[int], int]) -> None:
            prompt, tokens = request
            body = {"ignore_eos": True}
            answer = client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=tokens, seed=5, temperature=0.8, extra_body=body
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == tokens

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(one, prompts(count, seed)))

    def memory() -> dict[str, int]:
        pids = {f"{w['role']} {w['rank']}": w["pid"] for w in server.status()["workers"]} | {
            "router": server.process.pid
        }
        return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}

    load(600, seed=2)
    before = memory()
    load(1400, seed=3)
    after = memory()
    until(lambda: server.blocks_used() == 0)
    grown = {name: (after[name] - before[name]) >> 20 for name in after}
    print(f"MiB grown over 1400 requests: {grown}")
    assert max(grown.values()) < 24, f"MiB grown over 1400 requests: {grown}"


def test_the_server_goes_on_after_every_kind_of_bad_request(server: Serving, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.completions.create(model="gpt-5", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=MODEL, prompt=[1] * 2000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).usage


def error_of_stream(client: openai.OpenAI, started: threading.Event) -> str:
    try:
        chunks = client.completions.create(
            model=MODEL, prompt=[5], max_tokens=900, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in chunks:
            started.set()
    except openai.APIError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("victim", ["ffn", "attention"])
@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_killed_worker_that_may_not_come_back_is_named_and_hangs_nobody(
    model: Path, victim: str, transport: str, tmp_path: Path
) -> None:
    file = tmp_path / "once.yaml"
    file.write_text("cluster: {restarts: 0, recover_s: 0}\nrouter: {replay_s: 0.5}\n")
    with serving(model, str(file), "--backend", "local", "--topology", "1A2F", "--transport", transport) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            with ThreadPoolExecutor(4) as pool:
                started = [threading.Event() for _ in range(4)]
                errors = [pool.submit(error_of_stream, client, event) for event in started]
                assert all(event.wait(20) for event in started)
                psutil.Process(server.worker(victim)["pid"]).kill()
                sentences = [error.result(timeout=20) for error in errors]
            assert all(f"{victim}" in sentence for sentence in sentences), sentences
            until(lambda: server.worker(victim)["state"] == "lost", seconds=5.0)
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=MODEL, prompt="a", max_tokens=2)
            assert caught.value.status_code == 503
            assert victim in str(caught.value)
        assert server.stop()[0] == 0
