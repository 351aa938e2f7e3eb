"""What several microbatches hide of a slow link: decode of 1A1F over gRPC between two hosts (network namespaces).

    PYTHONPATH=. python tests/bench/bench_slow_link.py [--model smollm2-step3] [--dtype bf16] [--streams 48]
        [--tokens 24] [--microbatches 1 3] [--rounds 2]

Three links: as fast as the machine; 1 ms each way (a forwarder, tests/delay.py); 100 Mbit/s each way (tc tbf). Needs
root and `ip`. Each worker has one core's worth of threads; the forwarder shares the cores with them. A table of
medians, and beside each figure the milliseconds a step takes at that rate; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from afd import build
from afd.cluster.controller import Controller, new_epoch
from afd.cluster.host import Handle
from afd.cluster.local import ProcessHost
from afd.cluster.roles import Roles
from afd.config import Deployment, Resources
from afd.types import FfnAddress
from tests.bench.decode.ours import START_S, Engine
from tests.bench.decode.workload import BenchError, measure, random_prompts
from tests.hosts import Hosts, hosts, missing

DELAY_MS, MBIT_S = 1.0, 100.0
LINKS = ("fast", f"{DELAY_MS:g} ms", f"{MBIT_S:g} Mbit/s")
PROMPT = 16


def main() -> None:
    options = _options()
    if reason := missing():
        sys.exit(f"bench_slow_link: {reason}")
    plan = build.plan(Deployment().with_flags({"model": options.model, "dtype": options.dtype}))
    prompts = random_prompts(options.streams, PROMPT, plan.spec.vocab)
    rates: dict[tuple[str, int], list[float]] = {(m, n): [] for m in LINKS for n in options.microbatches}
    with hosts() as two, two.first.entered():  # for good: gRPC keeps threads, and they stay where they began
        for link, number in list(rates) * options.rounds:
            with _engine(two, link, number, options) as engine:
                rate = measure(engine, prompts, options.tokens, warmup=4).decode
            if rate is None:
                raise BenchError("too noisy: the prefill took longer than all of the run")
            rates[link, number].append(rate)
            print(f"  {link}, {number} microbatches: {rate:.0f} tokens/s", file=sys.stderr, flush=True)
    medians = {key: statistics.median(found) for key, found in rates.items()}
    print(
        "| link | " + " | ".join(f"{n} microbatches, tokens/s (ms a step)" for n in options.microbatches) + " | ratio |"
    )
    print("|---" * (len(options.microbatches) + 2) + "|")
    for link in LINKS:
        row = [medians[link, n] for n in options.microbatches]
        cells = " | ".join(f"{rate:.0f} ({options.streams / rate * 1e3:.0f})" for rate in row)
        print(f"| {link} | {cells} | {row[-1] / row[0]:.2f} |")
    found = {f"{link}, {n}": [round(rate, 1) for rate in values] for (link, n), values in rates.items()}
    print(json.dumps(vars(options) | {"load": os.getloadavg()[0], "tokens_per_s": found}))


@contextmanager
def _engine(two: Hosts, link: str, microbatches: int, options: argparse.Namespace) -> Iterator[Engine]:
    """1A1F with the attention worker on the first host, where this process is too, and the FFN worker on the second."""
    deployment = Deployment().with_flags(
        {
            "model": options.model,
            "dtype": options.dtype,
            "cluster.backend": "local",
            "transport.kind": "grpc",
            "attention.microbatches": microbatches,
            "attention.threads": 1,
            "ffn.threads": 1,
            "attention.kv_cache_gib": 0.5,
        }
    )
    with two.limited(MBIT_S) if link == LINKS[2] else nullcontext():
        host = _TwoHosts(two, DELAY_MS if link == LINKS[1] else 0.0)
        controller = Controller(deployment, host, Roles(), new_epoch())
        try:
            controller.begin()
            if not controller.wait_ready(START_S):
                raise BenchError(f"the workers were not ready within {START_S:g} s")
            yield Engine(f"{link}, {microbatches}", controller)
        finally:
            controller.stop(0.0)
            host.close()


class _TwoHosts(ProcessHost):
    """Forks each role on its host, and puts the forwarder before the FFN worker's door."""

    def __init__(self, two: Hosts, delay_ms: float) -> None:
        super().__init__()
        self._two = two
        self._delay_ms = delay_ms
        self._forwarders: list[subprocess.Popen[str]] = []

    def spawn(self, name: str, role: str, args: tuple[object, ...], resources: Resources) -> Handle:
        place = self._two.second if name.startswith("ffn") else self._two.first
        deployment, *others = args
        assert isinstance(deployment, Deployment)
        args = (deployment.with_flags({"transport.bind": place.address}), *others)
        self._forker.submit(place.enter).result()  # the thread that forks: its children begin where it is
        handle = super().spawn(name, role, args, resources)
        return _Far(handle, self._forward) if self._delay_ms and name.startswith("ffn") else handle

    def _forward(self, address: FfnAddress) -> FfnAddress:
        command = [sys.executable, "-m", "tests.delay", address.grpc, str(self._delay_ms), self._two.first.address]
        process = subprocess.Popen(
            self._two.first.command(*command), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        self._forwarders.append(process)
        assert process.stdout is not None
        return replace(address, grpc=process.stdout.readline().strip())

    def close(self) -> None:
        super().close()
        for process in self._forwarders:
            process.kill()
            process.communicate()


class _Far(Handle):
    """A worker whose address is not the one it gives."""

    def __init__(self, near: Handle, forward: Callable[[FfnAddress], FfnAddress]) -> None:
        self._near, self._forward = near, forward
        self.name, self.pid, self.node = near.name, near.pid, near.node

    def submit(self, method: str, *args: object) -> Future[Any]:
        call = self._near.submit(method, *args)
        if method != "start":
            return call
        moved: Future[Any] = Future()
        call.add_done_callback(lambda done: _settle(moved, done, self._forward))
        return moved

    def kill(self) -> None:
        self._near.kill()


def _settle(moved: Future[Any], done: Future[Any], forward: Callable[[FfnAddress], FfnAddress]) -> None:
    try:
        moved.set_result(forward(done.result()))
    except Exception as error:
        moved.set_exception(error)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-step3")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="bf16")
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
