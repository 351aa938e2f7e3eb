"""Workers of both roles are killed and frozen at random under load, for CHAOS_S seconds; by default briefly."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests import tiny
from tests.system.serving import Serving, serving, until

SECONDS = float(os.environ.get("CHAOS_S", "18"))
EVERY_S = 5.5  # from fault to fault: 10 in a minute
STREAMS, PROMPTS, TOKENS = 6, 12, 240
SILENT_S = 1.5  # after which a worker that hangs is found
FAULTS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
SETTINGS: dict[str, Any] = {
    "dtype": "fp32",
    "cluster": {"silent_s": SILENT_S, "restarts": 1000, "standby_ffn": 1},
    "router": {"silence_s": 2.0},
}


@dataclass
class Load:
    """Streams without end. `said` is what each prompt was answered, every time; `gaps` the times between two tokens of
    a stream, as (begin, end); `refused` counts those that were not accepted, because no attention worker was left."""

    url: str
    said: dict[int, list[list[int]]] = field(default_factory=lambda: {number: [] for number in range(PROMPTS)})
    gaps: list[tuple[float, float]] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> bool:
        """Whether it was accepted; then it must end as it should."""
        body = {"model": "tiny", "prompt": [number + 1, 2, 3], "max_tokens": TOKENS, "seed": number, "temperature": 0.9}
        body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
        ids, last_s = list[int](), time.monotonic()
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=90.0) as answer:
            if answer.status_code == 503:
                self.refused.append(number)
                return False
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
                    now_s = time.monotonic()
                    self.gaps.append((last_s, now_s))
                    last_s = now_s
        self.said[number].append(ids)
        return True

    def run(self, first: int) -> int:
        """Asks prompt after prompt until it is over; how many were accepted."""
        asked = 0
        while not self.over.is_set():
            if self.ask((first + asked * STREAMS) % PROMPTS):
                asked += 1
            else:
                self.over.wait(0.2)
        return asked

    def recovered_s(self, fault_s: float) -> float:
        """From a fault to the next token of the stream that waited longest for one."""
        return (
            max((end for begin, end in self.gaps if begin <= fault_s + 0.3 and end >= fault_s), default=fault_s)
            - fault_s
        )


def strike(server: Serving, dice: random.Random) -> tuple[str, float] | None:
    """A fault for one of the workers that serve; None where there is none just now."""
    serving_now = [w for w in server.status()["workers"] if w["state"] == "ready" and w["pid"]]
    if not serving_now:
        return None
    victim, how = dice.choice(serving_now), dice.choice(list(FAULTS))
    os.kill(victim["pid"], FAULTS[how])
    return f"{victim['role']} {how}", time.monotonic()


def test_killed_and_frozen_workers_of_both_roles_cost_no_stream_a_token(tmp_path: Path) -> None:
    dice = random.Random(20261124)
    model = tiny.write(tmp_path / "tiny")
    file = tmp_path / "deployment.yaml"
    file.write_text(json.dumps(SETTINGS))  # JSON is YAML
    with serving(model, str(file), "--backend", "local", "--topology", "2A2F") as server:
        quiet, load = Load(server.url), Load(server.url)
        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(quiet.ask, range(PROMPTS)))
            running = [pool.submit(load.run, first) for first in range(STREAMS)]
            faults, end_s = list[tuple[str, float]](), time.monotonic() + SECONDS
            try:
                while time.monotonic() < end_s:
                    if fault := strike(server, dice):
                        faults.append(fault)
                    load.over.wait(max(0.0, min(end_s - time.monotonic(), dice.uniform(0.8, 1.2) * EVERY_S)))
                    assert not any(stream.done() for stream in running), [s.exception() for s in running if s.done()]
            finally:
                load.over.set()
            asked = sum(stream.result(timeout=120) for stream in running)
        expected = {number: answers[0] for number, answers in quiet.said.items()}
        assert all(answer == expected[number] for number, answers in load.said.items() for answer in answers)
        assert sum(map(len, load.said.values())) == asked
        until(lambda: all(w["state"] == "ready" for w in server.status()["workers"]), 60.0)
        until(lambda: server.blocks_used() == 0)
        for role in ("ffn", "attention"):
            took = [load.recovered_s(at) for what, at in faults if what.startswith(role)]
            if took:
                middle, most = statistics.median(took), max(took)
                print(f"{role}: {len(took)} faults, to the next token {middle:.2f} s, at most {most:.2f} s")
        what = [what for what, _ in faults]
        print(f"{asked} streams, {len(load.refused)} refused, {len(what)} faults in {SECONDS:g} s: {what}")
    assert len(faults) >= SECONDS / EVERY_S / 1.3
