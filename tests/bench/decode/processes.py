"""Candidates that are one process of their own, asked through its standard input: the whole model, and the peers."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.bench.decode.workload import BenchError, Prompts, Run

CHILDREN = Path(__file__).parent / "children"
START_S, RUN_S, END_S = 900.0, 900.0, 30.0
LOG_LINES = 15  # of a child that failed


class Child:
    """A process that runs one of the scripts in children/. Its log is a file, whose end is part of what it is blamed
    for."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    def pids(self) -> list[int]:
        """See Candidate."""
        return [self._process.pid]

    def run(self, prompts: Prompts, tokens: int) -> Run:
        """See Candidate; the time is taken by the child."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        reply = self.hear(RUN_S)
        return Run(reply["seconds"], reply["arrivals"])

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The next answer. Raises BenchError when there is none within `timeout_s` seconds, or the child has ended."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise BenchError(f"{self.name} did not answer within {timeout_s:g} s; its log ends:\n{self._tail()}")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return dict(json.loads(line))

    def end(self) -> None:
        """Lets it end by itself, then kills what is left of it and of what it has started."""
        family = [p for pid in self.pids() if psutil.pid_exists(pid) for p in _family(pid)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        _, living = psutil.wait_procs(family, END_S)
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _ended(self) -> BenchError:
        return BenchError(f"{self.name} ended with code {self._process.wait()}; its log ends:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _family(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [*root.children(recursive=True), root]


@contextmanager
def whole(model: str, dtype: str, threads: int, folder: Path) -> Iterator[Child]:
    """Both halves of ours in one process. `folder` is for the log, as below."""
    with _child("whole", sys.executable, "whole_child.py", (model, dtype, str(threads)), {}, folder) as child:
        yield child


@contextmanager
def transformers(export: Path, dtype: str, threads: int, folder: Path) -> Iterator[Child]:
    """transformers of this Python on the model in `export`; dtype as torch calls it."""
    arguments = (str(export), dtype, str(threads))
    with _child("transformers", sys.executable, "transformers_child.py", arguments, {}, folder) as child:
        yield child


@contextmanager
def vllm_cpu(python: str, export: Path, dtype: str, threads: int, folder: Path) -> Iterator[Child]:
    """vLLM of the environment that `python` belongs to."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    with _child("vllm-cpu", python, "vllm_child.py", (str(export), dtype), settings, folder) as child:
        yield child


@contextmanager
def _child(
    name: str, python: str, script: str, arguments: Sequence[str], environ: Mapping[str, str], folder: Path
) -> Iterator[Child]:
    log = folder / f"{name}.log"
    with log.open("w") as errors:
        try:
            process = subprocess.Popen(
                [python, str(CHILDREN / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environ},
                start_new_session=True,
            )
        except OSError as error:
            raise BenchError(f"{name}: {python} cannot be started: {error.strerror}") from error
    child = Child(name, process, log)
    try:
        child.hear(START_S)
        yield child
    finally:
        child.end()
