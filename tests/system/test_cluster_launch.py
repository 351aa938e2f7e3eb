"""`afd serve` as a process, with toys for workers and the real router: starting, refusing, and leaving on a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.unit.cluster.clusters import is_gone

ROOT = Path(__file__).parents[2]
LAUNCH = """
import functools
from afd import cli
from afd.cluster import launch
from tests.unit.cluster.clusters import TOYS

launch.serve = functools.partial(launch.serve, roles=TOYS)
cli.main()
"""
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
BACKENDS = ["local", pytest.param("ray", marks=pytest.mark.ray)]


class Serve:
    """A running `afd serve`; what it prints on standard error is read at its end."""

    def __init__(self, tmp_path: Path, script: str, *flags: str, damage: Mapping[str, bytes] | None = None) -> None:
        """`damage` is what files of the model hold instead."""
        model = tmp_path / f"toy {script}"  # toys read their script from the model's name
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        words = {word: number for number, word in enumerate(["<unk>", "a", "b", "c", "d", "e", "f", "g"])}
        Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(model / "tokenizer.json"))
        for name, content in (damage or {}).items():
            (model / name).write_bytes(content)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", LAUNCH, "serve", "--model", str(model), "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, cwd=ROOT
        )

    def url(self) -> str:
        """Waits for the line that says where it serves."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        assert found, f"no URL in {line!r}; {self.process.stderr.read()!r}"  # type: ignore[union-attr]
        return found[0]

    def end(self, *signals: signal.Signals, within_s: float) -> tuple[int, str]:
        """Sends the signals; the exit code and standard error."""
        for number in signals:
            self.process.send_signal(number)
        began = time.monotonic()
        _, err = self.process.communicate(timeout=within_s + 20)
        assert time.monotonic() - began < within_s
        return self.process.returncode, err


@pytest.fixture
def started() -> Iterator[list[Serve]]:
    """Whatever a test starts and puts here is ended after it."""
    running: list[Serve] = []
    yield running
    for serve in running:
        serve.process.kill()
        serve.process.communicate()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_and_leaves_no_file(
    tmp_path: Path, started: list[Serve], backend: str, number: signal.Signals
) -> None:
    before = {*Path("/tmp").glob("afd-ray-*"), *Path("/dev/shm").iterdir()}
    serve = Serve(tmp_path, "good", "--backend", backend, "--topology", "1A2F")
    started.append(serve)
    workers = httpx.get(f"{serve.url()}/status").json()["workers"]
    assert len(workers) == 3
    code, err = serve.end(number, within_s=10)
    assert (code, "Traceback" in err) == (0, False), err
    assert all(is_gone(worker["pid"], 1.0) for worker in workers if worker["pid"])
    assert not ({*Path("/tmp").glob("afd-ray-*"), *Path("/dev/shm").iterdir()} - before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_worker_that_cannot_start_is_one_sentence_and_exit_code_2(
    tmp_path: Path, started: list[Serve], backend: str
) -> None:
    serve = Serve(tmp_path, "ffn0:refuse", "--backend", backend)
    started.append(serve)
    code, err = serve.end(within_s=60)
    assert code == 2
    assert err.splitlines()[-1] == "error: ffn 0 does not like its weights"
    assert "Traceback" not in err


def test_a_signal_while_workers_start_ends_it_too(tmp_path: Path, started: list[Serve]) -> None:
    serve = Serve(tmp_path, "ffn0:hang", "--backend", "local")
    started.append(serve)
    children = Path(f"/proc/{serve.process.pid}/task/{serve.process.pid}/children")
    assert children.exists()
    waited = time.monotonic() + 30
    while not list(_descendants(serve.process.pid)) and time.monotonic() < waited:
        pass
    pids = list(_descendants(serve.process.pid))
    assert pids
    code, err = serve.end(signal.SIGTERM, within_s=10)
    assert (code, "Traceback" in err) == (0, False), err
    assert all(is_gone(pid, 1.0) for pid in pids)


def _descendants(pid: int) -> Iterator[int]:
    """Children of all threads of a process."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, file.read_text().split())


def test_a_taken_port_is_told_before_any_worker_starts(tmp_path: Path, started: list[Serve]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serve = Serve(tmp_path, "ffn0:hang", "--backend", "local", "--port", str(port))
        started.append(serve)
        code, err = serve.end(within_s=30)
    assert code == 2
    assert f"127.0.0.1:{port}" in err
    assert "--port" in err


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", b'{"version": "1.0"', "tokenizer.json"),
        ("chat_template.jinja", b"{% for m in", "chat"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja is not readable UTF-8"),
    ],
)
def test_a_damaged_tokenizer_or_chat_template_is_told_before_any_worker_starts(
    tmp_path: Path, started: list[Serve], file: str, content: bytes, sentence: str
) -> None:
    serve = Serve(tmp_path, "ffn0:hang", "--backend", "local", damage={file: content})
    started.append(serve)
    code, err = serve.end(within_s=30)
    assert (code, "Traceback" in err) == (2, False), err
    assert err.startswith("error: ")
    assert sentence in err


def test_ray_missing_is_told_with_the_way_out(
    tmp_path: Path, started: list[Serve], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "without" / "ray"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ModuleNotFoundError('No module named ray', name='ray')")
    script = LAUNCH.replace("import functools", f"import functools, sys; sys.path.insert(0, {str(fake.parent)!r})")
    monkeypatch.setattr(sys.modules[__name__], "LAUNCH", script)
    serve = Serve(tmp_path, "good", "--backend", "ray")
    started.append(serve)
    code, err = serve.end(within_s=30)
    assert code == 2
    assert "pip install 'afd[ray]', or set cluster.backend to local" in err
