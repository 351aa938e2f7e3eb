"""How long streams pause when an FFN worker is lost: `python -m tests.bench.bench_recovery [--help]`.

Serves a model from plain processes, keeps streams running, and kills (SIGKILL) or freezes (SIGSTOP) an FFN worker in
turn. A fault's time goes from the signal to the end of the longest time without a token of any stream that begins
before it or within PAUSE_BEGINS_S of it. Prints a line a fault, with the longest time without a token in the seconds
that the replacement takes; medians; and last one line of JSON. Fails if a stream ends with an error, or says with the
same seed what it did not say before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx

from tests.system.serving import Serving, serving, until

FAULTS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
PAUSE_BEGINS_S = 0.3  # tokens that were on their way, and a step that needed only the others, are through by then
SETTLED_S = 1.5  # between a recovery and the next fault


@dataclass
class Load:
    """Streams that never end, each of the same prompt and seed over and over; `at` is when each token came."""

    url: str
    model: str
    tokens: int
    at: list[float] = field(default_factory=list)
    texts: dict[int, set[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, number: int) -> None:
        body = {"model": self.model, "prompt": [1 + number, 2, 3], "max_tokens": self.tokens, "seed": number}
        body |= {"temperature": 0.8, "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=120.0) as client:
            while not self.over.is_set():
                text = []
                with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    for line in answer.iter_lines():
                        if not line.startswith("data: {"):
                            continue
                        event = json.loads(line[6:])
                        if "error" in event:
                            self.errors.append(str(event["error"]))
                            return
                        self.at.append(time.monotonic())
                        text.append(event["choices"][0]["text"] if event["choices"] else "")
                self.texts.setdefault(number, set()).add("".join(text))


@contextmanager
def loaded(server: Serving, model: str, streams: int, tokens: int) -> Iterator[Load]:
    """Runs `streams` streams for as long as the block takes; they may then finish."""
    load = Load(server.url, model, tokens)
    threads = [threading.Thread(target=load.run, args=(number,), daemon=True) for number in range(streams)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(load.at) > 20 * streams or load.errors, 60.0)
        yield load
    finally:
        load.over.set()
        for thread in threads:
            thread.join(120.0)


def recover(server: Serving, load: Load, how: str, rank: int, limit_s: float = 60.0) -> tuple[float, float]:
    """Seconds from the fault to the first token after the pause that it made, and the longest pause until all workers
    served again, which this waits for."""
    victim = server.worker("ffn", rank)
    fault_s = time.monotonic()
    os.kill(victim["pid"], FAULTS[how])
    until(lambda: server.worker("ffn", rank)["pid"] != victim["pid"], limit_s)
    until(lambda: all(w["state"] == "ready" for w in server.status()["workers"]), limit_s)
    back_s = time.monotonic()
    until(lambda: load.errors or load.at[-1] > back_s + SETTLED_S, limit_s)
    gaps = [(after - before, before, after) for before, after in pairwise(sorted(load.at)) if after > fault_s]
    first = max(gap for gap in gaps if gap[1] < fault_s + PAUSE_BEGINS_S)
    return first[2] - fault_s, max(gaps)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="local", choices=("local", "ray"))
    parser.add_argument("--topology", default="1A2F")
    parser.add_argument("--faults", type=int, default=6, help="of each kind")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--standby", type=int, default=0)
    parser.add_argument("--silent-s", type=float, default=5.0)
    parser.add_argument("--deadline-s", type=float, default=30.0)
    args = parser.parse_args()
    deployment = Path(os.environ.get("TMPDIR", "/tmp")) / f"bench-recovery-{os.getpid()}.yaml"
    cluster = {"standby_ffn": args.standby, "silent_s": args.silent_s, "restarts": 100}
    settings = {
        "cluster": cluster,
        "ffn": {"replicas": args.replicas},
        "transport": {"deadline_s": args.deadline_s},
        "dtype": "fp32",
    }
    deployment.write_text(json.dumps(settings))  # which is YAML too
    ranks = int(args.topology.split("A")[1].rstrip("F"))
    found: dict[str, list[float]] = {how: [] for how in FAULTS}
    try:
        flags = (str(deployment), "--backend", args.backend, "--topology", args.topology)
        with serving(args.model, *flags) as server:
            model = server.status()["model"]
            with loaded(server, model, args.streams, args.tokens) as load:
                for turn in range(args.faults):
                    for how in FAULTS:
                        seconds, longest_s = recover(server, load, how, turn % ranks)
                        found[how].append(seconds)
                        line = f"{how:6} ffn_rank {turn % ranks}: {seconds:6.3f} s to the first new token"
                        print(f"{line}; longest pause until all serve again {longest_s:.3f} s", flush=True)
    finally:
        deployment.unlink()
    for line in server.lines:
        if "started again" in line or "in its place" in line:
            print(line.rstrip())
    differing = [number for number, texts in load.texts.items() if len(texts) > 1]
    assert not load.errors, load.errors
    assert not differing, f"streams {differing} did not always say the same"
    report = {how: {"median_s": round(statistics.median(s), 2), "max_s": round(max(s), 2)} for how, s in found.items()}
    for how, figures in report.items():
        print(f"{how}: median {figures['median_s']} s, longest {figures['max_s']} s")
    print(json.dumps({"settings": vars(args), **report}))


if __name__ == "__main__":
    main()
