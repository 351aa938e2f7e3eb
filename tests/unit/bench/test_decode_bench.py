"""The decode benchmark's own arithmetic: what it counts, what it divides, and who runs meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import psutil
import pytest

from tests.bench.decode.ours import _Stream
from tests.bench.decode.turns import turn, waiting
from tests.bench.decode.workload import BenchError, Prompts, Run, measure, random_prompts, steady_rate
from tests.system.serving import until

EVENT = b'data: {"choices":[{"text":"a","token_ids":[%b],"prompt_token_ids":[9,9,9]}]}\n\n'


class Scripted:
    """Takes `prefill_s` for the first token and `step_s` for each one after it."""

    name = "scripted"

    def __init__(self, prefill_s: float, step_s: float) -> None:
        self.prefill_s, self.step_s = prefill_s, step_s
        self.asked: list[tuple[int, int, int]] = []

    def pids(self) -> list[int]:
        return []

    def run(self, prompts: Prompts, tokens: int) -> Run:
        self.asked.append((len(prompts), len(prompts[0]), tokens))
        return Run(self.prefill_s + (tokens - 1) * self.step_s)


def test_decode_is_the_difference_of_two_runs_and_prefill_the_shorter_one():
    candidate = Scripted(prefill_s=2.0, step_s=0.5)
    found = measure(candidate, random_prompts(4, 100, 1000), tokens=10, warmup=3)
    assert found.decode == pytest.approx(4 / 0.5)
    assert found.prefill == pytest.approx(4 * 100 / 2.0)
    assert found.steady is None
    assert candidate.asked == [(4, 16, 3), (4, 100, 1), (4, 100, 11)]


def test_a_longer_run_that_took_less_time_gives_no_decode_rate():
    found = measure(Scripted(prefill_s=2.0, step_s=-0.1), random_prompts(1, 8, 1000), tokens=10, warmup=0)
    assert (found.decode, found.prefill) == (None, pytest.approx(4.0))


def test_the_steady_rate_counts_only_while_all_streams_decode():
    first = [0.0, 1.0, 2.0, 3.0]
    late = [1.5, 2.5, 3.5, 4.5]
    assert steady_rate([first, late]) == pytest.approx(3 / 1.5)  # 2.0, 2.5 and 3.0 in (1.5, 3.0]
    assert steady_rate([[0.0, 1.0], [5.0, 6.0]]) is None
    assert steady_rate([]) is None


def test_prompts_are_the_same_every_time_and_within_the_vocabulary():
    prompts = random_prompts(3, 50, vocab=300)
    assert prompts == random_prompts(3, 50, vocab=300)
    assert {len(prompt) for prompt in prompts} == {50}
    assert all(100 <= token < 300 for prompt in prompts for token in prompt)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_streamed_tokens_are_counted_however_the_bytes_are_cut(size):
    sent = (
        b"HTTP/1.1 200 OK\r\n\r\n" + EVENT % b"5" + EVENT % b"6,7,8" + EVENT % b"" + EVENT % b"9" + b"data: [DONE]\n\n"
    )

    async def receive() -> int:
        arrivals: list[float] = []
        stream = _Stream(b"", arrivals)
        for at in range(0, len(sent), size):
            stream.data_received(sent[at : at + size])
        await stream.ended
        return len(arrivals)

    assert asyncio.run(receive()) == 5


def test_a_stream_that_breaks_off_says_what_the_server_said():
    async def receive() -> None:
        stream = _Stream(b"", [])
        stream.data_received(b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error":"no worker"}')
        stream.connection_lost(None)
        await stream.ended

    with pytest.raises(BenchError, match=r"503(.|\n)*no worker"):
        asyncio.run(receive())


class Tree(Scripted):
    """A process with a child of its own, both asleep."""

    def __init__(self) -> None:
        super().__init__(1.0, 1.0)
        inner = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        outer = f"import subprocess; p = subprocess.Popen({inner!r}); print(p.pid, flush=True); p.wait()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.inner = int(self.process.stdout.readline())

    def pids(self) -> list[int]:
        return [self.process.pid]

    def is_stopped(self) -> bool:
        """The process and its child alike."""
        stopped = {psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in (self.process.pid, self.inner)}
        return stopped == {True}

    def runs(self) -> bool:
        return psutil.STATUS_STOPPED not in {psutil.Process(pid).status() for pid in (self.process.pid, self.inner)}

    def end(self) -> None:
        self.process.communicate(timeout=10)


def _fails_while_waiting(tree: Tree) -> None:
    with waiting(tree):
        until(tree.is_stopped)
        with turn(tree):
            until(tree.runs)
        until(tree.is_stopped)
        raise ZeroDivisionError


def test_a_waiting_candidate_stands_still_but_for_its_turn_and_runs_again_at_the_end():
    tree = Tree()
    try:
        with pytest.raises(ZeroDivisionError):
            _fails_while_waiting(tree)
        until(tree.runs)
    finally:
        tree.end()
