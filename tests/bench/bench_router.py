"""What a token costs in the router, and in the attention worker's service, on its way from the engine to the client.

    PYTHONPATH=. python tests/bench/bench_router.py [--trees . ../before] [--streams 64 8] [--rate 1500] [--busy]

Three processes for each tree and number of streams: an attention worker whose service is real and whose engine only
publishes tokens at the asked rate (a step of all streams, in `--microbatches` parts), the router, and a client that
reads the streams and throws the bytes away. Figures are microseconds of CPU per token: everything in the router's
process, and in the worker's process all but the engine's own thread. Source trees take turns inside every round; a
figure is the median over rounds. `--busy` adds two processes that compute all the time, as workers would. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WARM_UP_S = 1.0
MODEL = "bench"
BUSY = "while True: sum(range(10_000))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs="+", type=Path, default=[Path()])
    parser.add_argument("--streams", nargs="+", type=int, default=[64, 8])
    parser.add_argument("--rate", type=float, default=1500.0, help="tokens/s over all streams")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--tokenizer", type=Path, default=Path.home() / ".cache/afd/models/smollm2/tokenizer.json")
    parser.add_argument("--role", choices=["worker", "router"], help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        {"worker": worker, "router": router}[args.role](args)
        return
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        for _ in range(2 if args.busy else 0):
            busy = subprocess.Popen([sys.executable, "-c", BUSY])
            stack.callback(busy.kill)
        for _ in range(args.rounds):
            for streams in args.streams:
                for tree in args.trees:
                    found.setdefault(f"{tree.resolve()} {streams}", []).append(measure(args, tree.resolve(), streams))
    table = {
        name: {key: round(statistics.median(one[key] for one in rounds), 1) for key in rounds[0]}
        for name, rounds in found.items()
    }
    for name, row in table.items():
        print(f"{name:48}", *(f"{key} {value:8.1f}" for key, value in row.items()))
    print(json.dumps({"cores": os.cpu_count(), "busy": args.busy, "rate": args.rate, "figures": table}))


def measure(args: argparse.Namespace, tree: Path, streams: int) -> dict[str, float]:
    """One run of one tree: microseconds of CPU per token, and tokens/s that the client read."""
    step = [f"--{name}={getattr(args, name)}" for name in ("rate", "microbatches", "tokenizer")]
    with (
        child(tree, "worker", *step, f"--streams={streams}") as (worker, address),
        child(tree, "router", *step, f"--address={address}") as (router, url),
        Client(url, streams) as client,
    ):
        client.read_for(WARM_UP_S)
        before = ask(worker), ask(router)
        started = time.monotonic()
        tokens = client.read_for(args.seconds)
        seconds = time.monotonic() - started
        after = ask(worker), ask(router)
    service, relay = (1e6 * (b - a) / tokens for a, b in zip(before, after, strict=True))
    return {"router_us": relay, "service_us": service, "tokens_per_s": tokens / seconds}


@contextmanager
def child(tree: Path, role: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that runs `role` with the packages of `tree`, and the line it says when it is ready."""
    process = subprocess.Popen(
        [sys.executable, __file__, f"--role={role}", *options],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=tree,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen[str]) -> float:
    """Seconds of CPU that the child has used."""
    assert process.stdin is not None
    assert process.stdout is not None
    print("cpu", file=process.stdin, flush=True)
    return float(process.stdout.readline())


class Client:
    """Reads streams of endless answers on one thread."""

    def __init__(self, url: str, streams: int) -> None:
        where = urlsplit(url)
        self._selector = selectors.DefaultSelector()
        self._sockets = []
        for index in range(streams):
            sock = socket.create_connection((where.hostname, where.port))
            fields: dict[str, object] = {
                "model": MODEL,
                "prompt": [100 + index] * 8,
                "max_tokens": 10**6,
                "stream": True,
            }
            body = json.dumps(fields).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            self._selector.register(sock, selectors.EVENT_READ)
            self._sockets.append(sock)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()

    def read_for(self, seconds: float) -> int:
        """How many events arrived."""
        events, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in self._selector.select(0.1):
                events += key.fileobj.recv(1 << 16).count(b"data: ")  # type: ignore[union-attr]
        return events


def answer_questions(cpu_s: Callable[[], float]) -> None:
    for _ in sys.stdin:
        print(cpu_s(), flush=True)


class PacedEngine:
    """Stands for attention_worker.engine.Engine: every request gets a token a step, until it is cancelled."""

    def __init__(self, publish: Callable[[list[Any]], None], args: argparse.Namespace) -> None:
        self._publish = publish
        self._args = args
        self._living: dict[tuple[int, str], Any] = {}
        self.cpu_s = 0.0

    def submit(self, owner: int, request: Any) -> None:
        self._living[owner, request.request_id] = request

    def cancel(self, owner: int, request_id: str) -> None:
        self._living.pop((owner, request_id), None)

    def drop_owner(self, owner: int) -> None:
        self._living = {key: request for key, request in self._living.items() if key[0] != owner}

    def run(self) -> None:
        from afd.types import GenerateOutput, SampledToken

        parts, streams = self._args.microbatches, self._args.streams[0]
        pause, due, part, step = streams / parts / self._args.rate, time.monotonic(), 0, 0
        while True:
            due += pause
            time.sleep(max(0.0, due - time.monotonic()))
            part, step = (part + 1) % parts, step + 1
            keys = list(self._living)[part::parts]
            self._publish(
                [(owner, GenerateOutput(name, (SampledToken(1000 + step * 7 % 40_000),))) for owner, name in keys]
            )
            self.cpu_s = time.thread_time()


def worker(args: argparse.Namespace) -> None:
    from afd.rpc.convert import AttentionStatus, status_to_proto
    from attention_worker.service import Service

    service = Service(lambda: status_to_proto(AttentionStatus(0)), "127.0.0.1")
    address = service.start()
    engine = PacedEngine(service.publish, args)
    service.serve_engine(engine)  # type: ignore[arg-type]
    threading.Thread(target=engine.run, daemon=True).start()
    print(address, flush=True)
    answer_questions(lambda: time.process_time() - engine.cpu_s)


def router(args: argparse.Namespace) -> None:
    from afd.types import ClusterView, Role, WorkerView
    from router.app import RouterSettings, Server, bind

    settings = RouterSettings(
        model_name=MODEL, max_context=1 << 21, vocab_size=49152, tokenizer_json=args.tokenizer, poll_s=0.2
    )
    view = ClusterView(1, MODEL, "1A1F", (WorkerView(Role.ATTENTION, 0, "ready", args.address),))
    server = Server(settings, lambda: view, bind("127.0.0.1", 0), on_ready=lambda url: print(url, flush=True))
    threading.Thread(target=server.run, daemon=True).start()
    answer_questions(time.process_time)


if __name__ == "__main__":
    main()
