"""Four times more requests than a server can answer: what becomes of each, of the memory, and of the server after.

    PYTHONPATH=. python tests/bench/soak/overload.py [--seconds 60] [--factor 4]

Starts smollm2 as 1A1F, finds its capacity with a closed loop, then sends that many times `--factor`, at random moments,
half of them streamed, each with a deadline, every fourth with a short one. The last line is JSON.
tests/system/test_overload.py holds the same against what must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.system.serving import Serving, serving

MODEL = "smollm2"
PROMPT, TOKENS, VOCAB = 48, 12, 49_000
DEADLINE_S, SHORT_S = 8.0, 1.0
CLIENTS = 8  # of the closed loop: as many as run
REST_S = 5.0
DEPLOYMENT = """
attention:
  kv_cache_gib: 0.08
  max_running: 8
  max_waiting: 8
router:
  max_queue: 10
"""


@dataclass
class Outcome:
    """How a request ended: "done", "429", "504", "late" (the deadline, in the stream), or whatever else it was."""

    how: str
    seconds: float
    deadline_s: float
    retry_after: str = ""


@dataclass
class Report:
    """Rates in requests/s, times in seconds. `grown_mib`: resident memory at the end over a third in."""

    capacity: float
    offered: float
    outcomes: list[Outcome]
    grown_mib: dict[str, int]
    alone_before_s: float
    alone_after_s: float
    left_running: int
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = dict(Counter(outcome.how for outcome in self.outcomes))


@contextmanager
def server() -> Iterator[Serving]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "overload.yaml"
        file.write_text(DEPLOYMENT)
        with serving(MODEL, str(file), "--backend", "local", "--dtype", "fp32") as running:
            yield running


async def measure(running: Serving, seconds: float, factor: float) -> Report:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=running.url, timeout=DEADLINE_S + 30.0, limits=limits) as client:
        load = Load(client)
        alone_before_s = (await load.one(30.0, stream=False)).seconds
        capacity = await load.closed_loop(max(3.0, seconds / 10))
        early: dict[str, int] = {}
        outcomes = await load.open_loop(factor * capacity, seconds, lambda: early.update(memory(running)))
        late = memory(running)
        await asyncio.sleep(REST_S)
        alone_after = [await load.one(30.0, stream=False) for _ in range(3)]
    return Report(
        capacity=capacity,
        offered=len(outcomes) / seconds,
        outcomes=outcomes,
        grown_mib={name: (late[name] - early[name]) >> 20 for name in early},
        alone_before_s=alone_before_s,
        alone_after_s=min(outcome.seconds for outcome in alone_after if outcome.how == "done"),
        left_running=running.worker("attention")["status"]["running"],
    )


class Load:
    """Requests with prompts of their own."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._rng = random.Random(7)

    async def closed_loop(self, seconds: float) -> float:
        """Requests/s with CLIENTS at a time."""
        end, done = time.monotonic() + seconds, 0

        async def loop() -> None:
            nonlocal done
            while time.monotonic() < end:
                outcome = await self.one(30.0, stream=False)
                assert outcome.how == "done", outcome
                done += time.monotonic() < end

        await asyncio.gather(*(loop() for _ in range(CLIENTS)))
        return done / seconds

    async def open_loop(self, rate: float, seconds: float, a_third_in: Callable[[], None]) -> list[Outcome]:
        """`rate` requests/s, whatever becomes of them; `a_third_in` is called a third into it."""
        began, due, tasks, looked = time.monotonic(), 0.0, list[asyncio.Task[Outcome]](), False
        while (due := due + self._rng.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            if due > seconds / 3 and not looked:
                a_third_in()
                looked = True
            deadline_s = SHORT_S if len(tasks) % 4 == 3 else DEADLINE_S
            tasks.append(asyncio.create_task(self.one(deadline_s, stream=len(tasks) % 2 == 0)))
        return list(await asyncio.gather(*tasks))

    async def one(self, deadline_s: float, *, stream: bool) -> Outcome:
        body = {
            "model": MODEL,
            "prompt": [self._rng.randrange(VOCAB) for _ in range(PROMPT)],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            "timeout": deadline_s,
        }
        sent = time.monotonic()
        try:
            answer = await self._client.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            return Outcome(repr(error), time.monotonic() - sent, deadline_s)
        how = _how(answer)
        return Outcome(how, time.monotonic() - sent, deadline_s, answer.headers.get("retry-after", ""))


def _how(answer: httpx.Response) -> str:
    if answer.status_code != 200:
        return str(answer.status_code)
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return "done" if answer.json()["usage"]["completion_tokens"] == TOKENS else "a part"
    last = [line for line in answer.text.splitlines() if line][-1].removeprefix("data: ")
    if last == "[DONE]":
        return "done"
    return "late" if json.loads(last).get("error", {}).get("code") == "timeout" else f"ended with {last}"


def memory(running: Serving) -> dict[str, int]:
    """Resident bytes of every process."""
    pids = {f"{w['role']} {w['rank']}": w["pid"] for w in running.status()["workers"]}
    pids["router"] = running.process.pid
    return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=4.0)
    args = parser.parse_args()
    with server() as running:
        report = asyncio.run(measure(running, args.seconds, args.factor))
    done = sorted(outcome.seconds for outcome in report.outcomes if outcome.how == "done")
    print(f"capacity {report.capacity:.1f}/s, offered {report.offered:.1f}/s, done {len(done) / args.seconds:.1f}/s")
    print(f"outcomes {report.counts}; done in p50 {done[len(done) // 2]:.2f} s, longest {done[-1]:.2f} s")
    print(f"one request alone: {report.alone_before_s:.2f} s before, {report.alone_after_s:.2f} s after")
    print(f"MiB grown: {report.grown_mib}")
    figures = asdict(report)
    del figures["outcomes"]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
