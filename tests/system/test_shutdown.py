"""Ctrl-C while requests are in flight: everybody is told, and nothing is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from tests import tiny
from tests.system.serving import serving, until

MODEL = "tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("models") / MODEL)


def left_behind() -> set[Path]:
    """What a run may leave in the two places that it uses."""
    return {*Path("/tmp").glob("afd-ray-*"), *Path("/dev/shm").iterdir()}


def ending(url: str, started: threading.Event) -> str:
    """Runs a stream of 900 tokens to its end: the finish reason, or what the client was told instead."""
    reason = ""
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            for chunk in client.completions.create(
                model=MODEL, prompt=[5], max_tokens=900, temperature=0, stream=True, extra_body={"ignore_eos": True}
            ):
                started.set()
                reason = next((c.finish_reason for c in chunk.choices if c.finish_reason), reason)
    except openai.APIError as error:
        return str(error)
    return reason


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_an_interrupt_amid_streams_tells_them_and_leaves_no_process_and_no_file(model: Path, backend: str) -> None:
    before = left_behind()
    with serving(model, "--backend", backend, "--topology", "1A2F") as server, ThreadPoolExecutor(2) as pool:
        started = [threading.Event() for _ in range(2)]
        endings = [pool.submit(ending, server.url, event) for event in started]
        assert all(event.wait(20) for event in started)
        assert not any(end.done() for end in endings)
        family = [server.process.pid, *(p.pid for p in psutil.Process(server.process.pid).children(recursive=True))]
        assert len(family) >= 4

        interrupted_at = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert server.process.wait(timeout=30.0) == 0, "".join(server.lines)
        assert time.monotonic() - interrupted_at < 10.0

        assert all(end.result(timeout=10) for end in endings), [end.result() for end in endings]
        until(lambda: not any(psutil.pid_exists(pid) for pid in family), seconds=5.0)
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)
        assert left_behind() == before
        assert "Traceback" not in "".join(server.lines)
