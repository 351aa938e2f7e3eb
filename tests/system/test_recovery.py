"""Workers killed and frozen under running streams, with real processes: nobody but the clock can tell."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import tiny
from tests.system.serving import Serving, serving, until

MODEL = "tiny"
STREAMS, TOKENS = 3, 800
FAULTS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("models") / MODEL)


@contextmanager
def cluster(model: Path, folder: Path, topology: str, backend: str = "local", **settings: Any) -> Iterator[Serving]:
    file = folder / "deployment.yaml"
    file.write_text(json.dumps({"dtype": "fp32", **settings}))  # JSON is YAML
    with serving(model, str(file), "--backend", backend, "--topology", topology) as server:
        yield server


def ids_of(url: str, number: int, started: threading.Event | None = None) -> list[int]:
    """The token ids of one stream, which must end well."""
    body = {"model": MODEL, "prompt": [number + 1, 2, 3], "max_tokens": TOKENS, "seed": number, "temperature": 0.9}
    body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    ids = list[int]()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60.0) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
                if started is not None:
                    started.set()
    return ids


def all_ready(server: Serving) -> bool:
    return all(worker["state"] == "ready" for worker in server.status()["workers"])


def undisturbed(server: Serving) -> list[list[int]]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda number: ids_of(server.url, number), range(STREAMS)))


def strike(server: Serving, how: str, role: str, rank: int, expected: list[list[int]]) -> None:
    """Lets a fault hit one worker under running streams, which must say what they do undisturbed."""
    victim = server.worker(role, rank)["pid"]
    with ThreadPoolExecutor(STREAMS) as pool:
        started = [threading.Event() for _ in range(STREAMS)]
        streams = [pool.submit(ids_of, server.url, number, started[number]) for number in range(STREAMS)]
        assert all(event.wait(30.0) for event in started)
        os.kill(victim, FAULTS[how])
        assert not any(stream.done() for stream in streams), "the fault came too late to be one"
        disturbed = [stream.result(timeout=60.0) for stream in streams]
    until(lambda: server.worker(role, rank)["pid"] != victim and all_ready(server))
    assert disturbed == expected
    until(lambda: server.blocks_used() == 0)
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)


def test_ffn_workers_killed_and_frozen_under_streams_change_no_token(model: Path, tmp_path: Path) -> None:
    settings = {"cluster": {"silent_s": 1.5, "standby_ffn": 1}}
    with cluster(model, tmp_path, "2A2F", **settings) as server:
        expected = undisturbed(server)
        strike(server, "killed", "ffn", 1, expected)
        strike(server, "frozen", "ffn", 0, expected)
        address = server.worker("attention", 1)["address"]
        os.kill(server.worker("attention", 1)["pid"], signal.SIGKILL)
        until(lambda: server.worker("attention", 1)["address"] not in (address, "") and all_ready(server))
        assert undisturbed(server) == expected, "the one that came back says the same"
        assert server.stop()[0] == 0
    assert "Traceback" not in "".join(server.lines)


def test_of_two_replicas_one_may_be_lost_without_a_pause(model: Path, tmp_path: Path) -> None:
    settings = {"ffn": {"replicas": 2}, "transport": {"deadline_s": 0.5}}
    with cluster(model, tmp_path, "1A1F", **settings) as server:
        expected = undisturbed(server)
        strike(server, "killed", "ffn", 0, expected)
        strike(server, "frozen", "ffn", 0, expected)
        assert server.stop()[0] == 0


def controller_of(server: Serving) -> psutil.Process:
    """Ray's actor that reconciles; the others are workers, whose pids the status tells."""
    workers = {worker["pid"] for worker in server.status()["workers"]}
    actors = [p for p in psutil.Process(server.process.pid).children(recursive=True) if p.name().startswith("ray::")]
    (found,) = [p for p in actors if p.pid not in workers and "RayServant" in p.name()]
    return found


@pytest.mark.ray
def test_a_frozen_and_then_killed_controller_disturbs_no_stream_and_its_successor_mends(
    model: Path, tmp_path: Path
) -> None:
    with cluster(model, tmp_path, "1A1F", backend="ray") as server:
        expected = undisturbed(server)
        first = controller_of(server)
        first.suspend()
        assert undisturbed(server) == expected
        first.kill()
        assert undisturbed(server) == expected
        strike(server, "killed", "ffn", 0, expected)
        assert server.stop()[0] == 0
