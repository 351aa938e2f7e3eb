"""Round trips of every transport between two real processes, beside a memcpy, bare sockets and bare gRPC.

    PYTHONPATH=. python tests/bench/bench_transport.py [--rounds 5] [--spin-us 200] [--free] [--kinds shm grpc ...]

One process per transport echoes: each dispatch comes back as a combine of the same bytes. Kinds and sizes take turns
inside every round, so that a noisy minute hits all of them; a figure is the median over rounds of the round's median.
GB/s counts the bytes of both directions over the round trip; with four microbatches in flight, as workers have them,
the bytes of all round trips over their time. The memcpy makes the two copies that shared memory cannot
avoid, in one thread; the bare sockets and gRPC stream send and receive the same bytes with nothing around them. With
"threads" the bare stream is used as a worker must, which waits for many links at once and answers when it has
computed: messages go through queues to and from a thread that is not gRPC's. That is the floor for the grpc transport.
Unless --free is given, this process runs on the first core and the echoing ones on the second. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import queue
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from afd.rpc.core import grpc
from afd.transport.base import Hello
from afd.transport.registry import connect, listen
from afd.types import DType, FfnAddress

KIB, MIB = 1024, 1024**2
SIZES = (KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 14 * MIB)
KINDS = ("shm", "grpc", "collective")
HIDDEN = 256  # float32, so that a token is 1 KiB
BUDGET_S = 0.25  # of one round of one kind and size
HELLO = Hello(
    epoch=1,
    model_digest="bench",
    attention_rank=0,
    ffn_rank=0,
    ep=1,
    tp=1,
    dtype=DType.FP32,
    dispatch_dtype=DType.FP32,
    num_layers=1,
    hidden_size=HIDDEN,
    num_experts=0,
    top_k=0,
    max_tokens=max(SIZES) // (4 * HIDDEN),
    microbatches=4,
)

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

RoundTrip = Callable[[int], None]
Frames = Callable[[int, int], None]  # bytes of a frame, how many go there and back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spin-us", type=int, default=200)
    parser.add_argument("--free", action="store_true", help="let the scheduler place the processes")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--idle-s", type=float, default=3.0, help="how long to watch idle workers' CPU time")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    cores = None if flags.free else sorted(os.sched_getaffinity(0))[:2]
    if cores:
        os.sched_setaffinity(0, {cores[0]})
    with ExitStack() as stack:
        trips: dict[str, RoundTrip] = {"memcpy": copies()}
        streams: dict[str, Frames] = {}
        pids: dict[str, int] = {}
        for kind in flags.kinds:
            trips[kind], streams[kind], pids[kind] = stack.enter_context(transport(kind, flags.spin_us, cores))
        for name in ("unix socket", "tcp socket"):
            trips[name] = stack.enter_context(bare_socket(name, cores))
        trips["bare gRPC"] = stack.enter_context(bare_grpc(cores))
        trips["bare gRPC, threads"] = stack.enter_context(threaded_grpc(cores))
        medians = measure(trips, flags.sizes, flags.rounds)
        rates = {
            kind: {size: rate(stream, size, flags.rounds) for size in flags.sizes} for kind, stream in streams.items()
        }
        idle = {kind: cpu_share(pid, flags.idle_s) for kind, pid in pids.items()}
    print_table(medians, flags.sizes)
    print("\nGB/s with four microbatches in flight:")
    for kind, row in rates.items():
        print(f"{kind}: " + ", ".join(f"{named(size)} {per_s / 1e9:.2f}" for size, per_s in row.items()))
    print("\nCPU time of an idle FFN worker: " + ", ".join(f"{k} {100 * v:.2f} %" for k, v in idle.items()))
    result = {
        "bench": "transport",
        "spin_us": flags.spin_us,
        "pinned": bool(cores),
        "rounds": flags.rounds,
        "idle_cpu": idle,
        "in_flight_gb_per_s": {
            kind: {str(s): round(r / 1e9, 3) for s, r in row.items()} for kind, row in rates.items()
        },
        "round_trip_us": {kind: {str(s): round(1e6 * t, 1) for s, t in row.items()} for kind, row in medians.items()},
    }
    print(json.dumps(result))


def measure(trips: dict[str, RoundTrip], sizes: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of a round trip, by kind and bytes."""
    found: dict[str, dict[int, list[float]]] = {kind: {size: [] for size in sizes} for kind in trips}
    for _ in range(rounds):
        for size in sizes:
            for kind, trip in trips.items():
                found[kind][size].append(one_round(trip, size))
    return {k: {size: statistics.median(times) for size, times in row.items()} for k, row in found.items()}


def one_round(trip: RoundTrip, size: int) -> float:
    times, end = [], time.perf_counter() + BUDGET_S
    for _ in range(3):
        trip(size)
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        trip(size)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rate(stream: Frames, size: int, rounds: int) -> float:
    """Bytes a second, both ways together; the median of `rounds`."""
    frames = max(8, min(400, 200 * MIB // size))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        stream(size, frames)
        found.append(2 * size * frames / (time.perf_counter() - start))
    return statistics.median(found)


def print_table(medians: dict[str, dict[int, float]], sizes: list[int]) -> None:
    print("| bytes each way | " + " | ".join(medians) + " |")
    print("|---|" + "---|" * len(medians))
    for size in sizes:
        cells = [f"{1e6 * row[size]:,.0f} µs, {2 * size / row[size] / 1e9:.2f} GB/s" for row in medians.values()]
        print(f"| {named(size)} | " + " | ".join(cells) + " |")


def named(size: int) -> str:
    return f"{size // KIB} KiB" if size < MIB else f"{size // MIB} MiB"


def cpu_share(pid: int, seconds: float) -> float:
    """Part of a core that a process uses while nobody talks to it."""

    def used_s() -> float:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used_s()
    time.sleep(seconds)
    return (used_s() - before) / seconds


# ---- what is measured -----------------------------------------------------------------------------------------


def payload(size: int) -> Tensor:
    """float32 [tokens, HIDDEN] of `size` bytes"""
    return torch.ones(size // (4 * HIDDEN), HIDDEN)


def copies() -> RoundTrip:
    buffers = {size: [payload(size) for _ in range(3)] for size in SIZES}

    def trip(size: int) -> None:
        first, second, third = buffers[size]
        second.copy_(first)
        third.copy_(second)

    return trip


@contextmanager
def transport(kind: str, spin_us: int, cores: list[int] | None) -> Iterator[tuple[RoundTrip, Frames, int]]:
    with echo_process(_echo_frames, kind, spin_us, cores) as (address, pid):
        assert isinstance(address, FfnAddress)
        port = connect(kind, [address], HELLO, connect_s=30.0, deadline_s=30.0, spin_us=spin_us)
        tensors = {size: payload(size) for size in SIZES}
        step = 0

        def send(microbatch: int, size: int) -> None:
            nonlocal step
            port.dispatch(microbatch, step, 0, tensors[size], None, None)
            step += 1

        def answered() -> int:
            """The microbatch whose answer is here."""
            while (frame := port.collect(30.0)) is None:
                pass
            return frame.microbatch

        def trip(size: int) -> None:
            send(0, size)
            answered()

        def stream(size: int, frames: int) -> None:
            for microbatch in range(HELLO.microbatches):
                send(microbatch, size)
            for _ in range(frames - HELLO.microbatches):
                send(answered(), size)
            for _ in range(HELLO.microbatches):
                answered()

        try:
            yield trip, stream, pid
        finally:
            port.close()


def _echo_frames(kind: str, spin_us: int, cores: list[int] | None, pipe: Connection) -> None:
    _settle(cores)
    port = listen(kind, replace(HELLO), bind="127.0.0.1", spin_us=spin_us, deadline_s=30.0)
    pipe.send(port.address)
    while not pipe.poll():
        frame = port.receive(1.0)
        while frame is not None:
            port.combine(frame, frame.hidden)
            frame = port.receive(0.5)
    port.close()


@contextmanager
def bare_socket(name: str, cores: list[int] | None) -> Iterator[RoundTrip]:
    family = socket.AF_UNIX if name.startswith("unix") else socket.AF_INET
    with echo_process(_echo_bytes, family.value, 0, cores) as (address, _):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.connect(address)
        _no_delay(sock)
        data, back = bytearray(max(SIZES)), memoryview(bytearray(max(SIZES)))

        def trip(size: int) -> None:
            sock.sendall(size.to_bytes(8, "little"))
            _exchange(sock, memoryview(data)[:size], back[:size])

        yield trip
        sock.close()


def _exchange(sock: socket.socket, out: memoryview, into: memoryview) -> None:
    sock.sendall(out)
    _receive_all(sock, into)


def _receive_all(sock: socket.socket, into: memoryview) -> None:
    got = 0
    while got < len(into):
        count = sock.recv_into(into[got:])
        if not count:
            raise ConnectionError("the other end closed")
        got += count


def _echo_bytes(family: int, _: int, cores: list[int] | None, pipe: Connection) -> None:
    _settle(cores)
    door = socket.socket(family, socket.SOCK_STREAM)
    door.bind(f"\0afd-bench-{os.getpid()}" if family == socket.AF_UNIX else ("127.0.0.1", 0))
    door.listen()
    pipe.send(door.getsockname())
    sock, _peer = door.accept()
    _no_delay(sock)
    buffer, length = memoryview(bytearray(max(SIZES))), memoryview(bytearray(8))
    while True:
        try:
            _receive_all(sock, length)
            size = int.from_bytes(length, "little")
            _receive_all(sock, buffer[:size])
            sock.sendall(buffer[:size])
        except ConnectionError:
            return


@contextmanager
def bare_grpc(cores: list[int] | None) -> Iterator[RoundTrip]:
    with echo_process(_echo_messages, "", 0, cores) as (address, _):
        messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with grpc.insecure_channel(str(address), options=UNLIMITED) as channel:
            answers = channel.stream_stream("/bench/Echo")(iter(messages.get, None))
            data = {size: bytes(size) for size in SIZES}

            def trip(size: int) -> None:
                messages.put(data[size])
                next(answers)

            yield trip
            messages.put(None)


@contextmanager
def threaded_grpc(cores: list[int] | None) -> Iterator[RoundTrip]:
    with echo_process(_echo_messages, "threads", 0, cores) as (address, _):
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        with grpc.insecure_channel(str(address), options=UNLIMITED) as channel:
            echo = channel.stream_stream("/bench/Echo", response_deserializer=lambda m: inbox.put(m) or m)
            threading.Thread(target=_ask, args=(echo(iter(outbox.get, None)),), daemon=True).start()
            data = {size: bytes(size) for size in SIZES}

            def trip(size: int) -> None:
                outbox.put(data[size])
                inbox.get(timeout=30.0)

            yield trip
            outbox.put(None)


def _ask(messages: Iterator[bytes]) -> None:
    with suppress(grpc.RpcError):
        for _ in messages:
            pass


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(lambda messages, _context: messages)


class _EchoThreads(grpc.GenericRpcHandler):  # type: ignore[misc]
    """For one stream."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(self._exchange, lambda m: self._inbox.put(m) or m)

    def _answer(self) -> None:
        while True:
            self._outbox.put(self._inbox.get())

    def _exchange(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        threading.Thread(target=_ask, args=(messages,), daemon=True).start()
        while context.is_active():
            with suppress(queue.Empty):
                yield self._outbox.get(timeout=1.0)


def _echo_messages(what: str, _: int, cores: list[int] | None, pipe: Connection) -> None:
    _settle(cores)
    server = grpc.server(ThreadPoolExecutor(1), handlers=[_EchoThreads() if what else _Echo()], options=UNLIMITED)
    pipe.send(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    server.wait_for_termination()


def _no_delay(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _settle(cores: list[int] | None) -> None:
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {cores[-1]})


@contextmanager
def echo_process(
    target: Callable[..., None], what: str | int, spin_us: int, cores: list[int] | None
) -> Iterator[tuple[object, int]]:
    """A process that says where it listens."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(what, spin_us, cores, there), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(60), f"the process of {what} did not start"
        assert process.pid is not None
        yield here.recv(), process.pid
    finally:
        here.close()
        process.join(5.0)
        process.kill()
        process.join()


if __name__ == "__main__":
    main()
