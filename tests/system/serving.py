"""`afd serve` as a user runs it: a process with arguments, an URL, and a way to end it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from afd.config import TlsSection

# The command as a user has it: beside the Python that runs the tests.
AFD = str(Path(sys.executable).with_name("afd"))
READY = re.compile(r"is served at (\S+)/v1")


@dataclass
class Serving:
    """A running server. `lines` is what it printed so far; `api_key`: what it wants to be asked with; `tls`: of its
    workers."""

    process: subprocess.Popen[str]
    url: str = ""
    start_s: float = 0.0
    lines: list[str] = field(default_factory=list)
    api_key: str = ""
    tls: TlsSection | None = None

    def status(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return dict(httpx.get(f"{self.url}/status", headers=headers, timeout=10.0).json())

    def worker(self, role: str, rank: int = 0) -> dict[str, Any]:
        return next(w for w in self.status()["workers"] if (w["role"], w["rank"]) == (role, rank))

    def blocks_used(self) -> int:
        return sum(w["status"]["blocks_used"] for w in self.status()["workers"] if w["role"] == "attention")

    def stop(self, how: signal.Signals = signal.SIGINT) -> tuple[int, float]:
        """Its exit code, and how many seconds it took to end."""
        started = time.monotonic()
        self.process.send_signal(how)
        code = self.process.wait(timeout=30.0)
        return code, time.monotonic() - started


def until(true: Any, seconds: float = 20.0) -> None:
    """Waits for something that another process is about to make true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"still not so after {seconds:g} s"
        threading.Event().wait(0.02)


@contextmanager
def serving(
    model: str | Path, *arguments: str, seconds: float = 120.0, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """Runs until the block ends; whatever is left then is killed. `environment` is added to this process's."""
    command = [AFD, "serve", "--model", str(model), "--port", "0", *arguments]
    with running(command, seconds=seconds, environment=environment) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str], *, seconds: float = 120.0, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """The same for any command that becomes an `afd serve`."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    server = Serving(process)
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.lines.append(line)
            if match := READY.search(line):
                server.url, server.start_s = match[1], time.monotonic() - started
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not ready.wait(seconds) or not server.url:
            pytest.fail(f"`{' '.join(command)}` did not serve:\n{''.join(server.lines)}")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reader.join(timeout=10.0)
        assert process.stdout is not None
        process.stdout.close()


def refused(*arguments: str) -> tuple[int, str]:
    """Runs `afd serve` with arguments that cannot be served: its exit code and what it said."""
    done = subprocess.run([AFD, "serve", *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr
