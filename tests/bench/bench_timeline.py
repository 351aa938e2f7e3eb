"""What the always-on timeline costs: one mark, and its share of each worker's time while it decodes.

    PYTHONPATH=. python tests/bench/bench_timeline.py [--model NAME] [--streams 1 64] [--seconds 3]

A mark alone is timed in a loop, with everything in the caches. Marks at work are timed where they are made: worker
processes whose marks have a stopwatch around them serve --streams requests, and the median is taken, less that of an
empty stopwatch. The share of a worker's time is that median times its marks per second; the goal is below 1 %. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections import deque
from typing import Any

from afd.cluster.controller import Cluster
from afd.cluster.launch import open_cluster
from afd.cluster.roles import Roles
from afd.config import Deployment
from afd.credentials import Credentials, for_run
from afd.pipeline.analysis import picture
from afd.pipeline.summary import summarise
from afd.pipeline.timeline import Activity, Timeline
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import GenerateRequest, Role, SamplingParams
from attention_worker.actor import AttentionWorker
from ffn_worker.actor import FfnWorker

GOAL = 0.01
WARM_MARKS, WARM_ROUNDS = 100_000, 7
AT_WORK = 10_000  # newest marks of a worker that count
PROMPT = 128

_mark = Timeline.mark
_stopped_ns: deque[int] = deque(maxlen=AT_WORK)


def _timed_mark(self: Timeline, *args: Any, **more: Any) -> int:
    began_ns = time.perf_counter_ns()
    now_ns = _mark(self, *args, **more)
    marked_ns = time.perf_counter_ns()
    _stopped_ns.append(2 * marked_ns - began_ns - time.perf_counter_ns())
    return now_ns


class TimedAttention(AttentionWorker):
    def __init__(self, *args: Any) -> None:
        Timeline.mark = _timed_mark  # type: ignore[method-assign]  # in this worker's process only
        super().__init__(*args)

    def status(self) -> dict[str, object]:
        return super().status() | {"mark_ns": round(statistics.median(_stopped_ns.copy() or [0]))}


class TimedFfn(FfnWorker):
    def __init__(self, *args: Any) -> None:
        Timeline.mark = _timed_mark  # type: ignore[method-assign]
        super().__init__(*args)

    def status(self) -> dict[str, object]:
        return super().status() | {"mark_ns": round(statistics.median(_stopped_ns.copy() or [0]))}


TIMED = Roles(
    attention=f"tests.bench.bench_timeline:{TimedAttention.__name__}",
    ffn=f"tests.bench.bench_timeline:{TimedFfn.__name__}",
)


def warm_ns() -> float:
    """The quickest round's mean, the loop around it included."""
    timeline, rounds = Timeline(Role.ATTENTION, 0), []
    for _ in range(WARM_ROUNDS):
        began_ns = time.perf_counter_ns()
        for step in range(WARM_MARKS):
            timeline.mark(Activity.DISPATCH, 1, step, 7, 64, 73728)
        rounds.append((time.perf_counter_ns() - began_ns) / WARM_MARKS)
    return min(rounds)


async def measure(cluster: Cluster, credentials: Credentials, streams: int, seconds: float) -> dict[str, Any]:
    """Decodes `streams` requests, and looks at the last `seconds`."""
    (address,) = [worker.address for worker in cluster.view().workers if worker.role is Role.ATTENTION]
    client = await AttentionClient.connect(address, peer="attention worker 0", deadline_s=10.0, credentials=credentials)
    inbox, begun = Inbox(), set[str]()
    params = SamplingParams(max_tokens=4000, temperature=0.0, ignore_eos=True)
    try:
        for number in range(streams):
            prompt = tuple(100 + (number * 31 + i) % 20000 for i in range(PROMPT))
            client.submit(GenerateRequest(str(number), prompt, params), inbox)
        while len(begun) < streams:
            begun |= {output.request_id for output in await inbox.take() if output.tokens}
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            for output in await inbox.take():
                assert output.finish_reason is None, f"request {output.request_id} ended: {output}"
        summary = summarise(picture(cluster.timelines(seconds, 200_000), seconds))
    finally:
        await client.close()
    mark_ns = {worker.role: worker.counters["mark_ns"] for worker in cluster.view().workers}
    row: dict[str, Any] = {"streams": streams, "tokens_per_s": summary.sampled_tokens_per_s}
    for worker in summary.workers:
        marks_per_s = worker.spans / summary.window_s
        share = marks_per_s * mark_ns[worker.role] / 1e9
        row[worker.role.value] = {"mark_ns": mark_ns[worker.role], "marks_per_s": marks_per_s, "share": share}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    warm = warm_ns()
    print(f"a mark alone: {warm:.0f} ns, {1e9 / warm:,.0f} per second")
    deployment = Deployment().with_flags({"model": options.model, "topology": "1A1F", "cluster.backend": "local"})
    credentials = for_run(deployment)
    with open_cluster(deployment, TIMED, credentials) as cluster:
        assert cluster.wait_ready(300.0), "the workers did not start"
        rows = [asyncio.run(measure(cluster, credentials, streams, options.seconds)) for streams in options.streams]
        cluster.stop(0.0)
    print(f"{'streams':>8} {'tokens/s':>9} {'side':>10} {'ns a mark':>10} {'marks/s':>9} {'share':>7}")
    for row in rows:
        for role in ("attention", "ffn"):
            cost = row[role]
            print(
                f"{row['streams']:>8} {row['tokens_per_s']:>9.1f} {role:>10} {cost['mark_ns']:>10} "
                f"{cost['marks_per_s']:>9.0f} {cost['share']:>7.2%}"
            )
    largest = max(row[role]["share"] for row in rows for role in ("attention", "ffn"))
    print(f"largest share {largest:.2%}; the goal is below {GOAL:.0%}: {'held' if largest < GOAL else 'missed'}")
    machine = platform.processor() or platform.machine()
    found = {"bench": "timeline", "machine": machine, "model": options.model, "prompt": PROMPT, "mark_alone_ns": warm}
    print(json.dumps(found | {"rows": rows, "largest_share": largest}))


if __name__ == "__main__":
    main()
