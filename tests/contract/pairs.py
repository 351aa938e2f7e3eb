"""Workers for the contract tests: FFN loops in threads and in processes, and raw links that misbehave."""

from __future__ import annotations

import multiprocessing as mp
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from afd.credentials import OPEN, Credentials
from afd.transport import collective, grpc_stream, local, shm
from afd.transport.attention_port import AttentionPort
from afd.transport.base import Hello, Link, Listener
from afd.transport.frame import Frame
from afd.transport.local import Faults
from afd.transport.ports import FfnPort
from afd.transport.registry import connect, host_key, listen
from afd.types import DType, FfnAddress

KINDS = ("inproc", "shm", "grpc", "collective")
BETWEEN_PROCESSES = ("shm", "grpc", "collective")
HELLO = Hello(
    epoch=2**40 + 7,
    model_digest="sha256:0123",
    attention_rank=0,
    ffn_rank=0,
    ep=1,
    tp=1,
    dtype=DType.FP32,
    dispatch_dtype=DType.FP32,
    num_layers=4,
    hidden_size=48,
    num_experts=8,
    top_k=2,
    max_tokens=32,
    microbatches=3,
)
torch.set_num_threads(1)  # in spawned children too: they import this file
SOON_S = 10.0  # a bound for waits that end at once unless something is broken

Answer = Callable[[FfnPort, Frame], None]


def double(port: FfnPort, frame: Frame) -> None:
    """An FFN that doubles its input."""
    assert frame.hidden is not None
    port.combine(frame, frame.hidden * 2)


def silence(port: FfnPort, frame: Frame) -> None:
    """An FFN that never answers."""


class FfnThread:
    """An FFN loop in a thread. `run` has things done by that thread between frames."""

    def __init__(self, port: FfnPort, answer: Answer) -> None:
        self.port, self.answer = port, answer
        self._stop = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="test-ffn")
        self._thread.start()

    def _loop(self) -> None:
        try:
            while not self._stop:
                frame = self.port.receive(SOON_S)
                if frame is not None:
                    self.answer(self.port, frame)
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        """Ends the loop; raises what it raised."""
        self._stop = True
        self.port.wake()
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), "the FFN loop does not end"
        if self._error is not None:
            raise self._error


def open_ffn(
    kind: str,
    expected: Hello = HELLO,
    *,
    bind: str = "127.0.0.1",
    deadline_s: float = SOON_S,
    faults: Faults | None = None,
    credentials: Credentials = OPEN,
) -> FfnPort:
    return listen(kind, expected, bind=bind, spin_us=20, deadline_s=deadline_s, faults=faults, credentials=credentials)


@contextmanager
def ffn_worker(
    kind: str,
    answer: Answer = double,
    expected: Hello = HELLO,
    faults: Faults | None = None,
    credentials: Credentials = OPEN,
) -> Iterator[FfnThread]:
    """A running FFN worker in this process."""
    port = open_ffn(kind, expected, faults=faults, credentials=credentials)
    try:
        worker = FfnThread(port, answer)
        try:
            yield worker
        finally:
            worker.stop()
    finally:
        port.close()


@contextmanager
def attention(
    kind: str,
    addresses: Sequence[FfnAddress],
    hello: Hello = HELLO,
    *,
    connect_s: float = SOON_S,
    deadline_s: float = SOON_S,
    faults: Faults | None = None,
    credentials: Credentials = OPEN,
) -> Iterator[AttentionPort]:
    """A connected attention side."""
    port = connect(
        kind,
        addresses,
        hello,
        connect_s=connect_s,
        deadline_s=deadline_s,
        spin_us=20,
        faults=faults,
        credentials=credentials,
    )
    try:
        yield port
    finally:
        port.close()


def collect(port: AttentionPort) -> Frame:
    """The next answer, which must come."""
    frame = port.collect(SOON_S)
    assert frame is not None, "no answer came"
    return frame


def tokens(count: int, dtype: DType = DType.FP32, seed: int = 0) -> torch.Tensor:
    """y [count, hidden]"""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, HELLO.hidden_size, generator=generator)
    return y if dtype is DType.FP32 else y.bfloat16()


def routing(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_ids and expert_weights [count, top_k]"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(HELLO.num_experts, (count, HELLO.top_k), generator=generator, dtype=torch.int32)
    return ids, torch.rand(count, HELLO.top_k, generator=generator)


def raw_listener(kind: str, expected: Hello = HELLO) -> Listener:
    """A bare door, for an FFN side that misbehaves."""
    if kind == "inproc":
        return local.listen(expected)
    if kind == "collective":
        return collective.listen(expected, "127.0.0.1", SOON_S)
    return shm.listen(expected, SOON_S) if kind == "shm" else grpc_stream.listen(expected, "127.0.0.1")


def raw_address(kind: str, listener: Listener) -> FfnAddress:
    return replace(FfnAddress(0, host_key()), **{kind: listener.address})


def raw_dial(kind: str, address: FfnAddress, hello: Hello = HELLO) -> Link:
    """A bare link, for an attention side that misbehaves."""
    if kind == "inproc":
        return local.dial(address.inproc, hello)
    if kind == "shm":
        return shm.dial(address.shm, hello, SOON_S, SOON_S)
    if kind == "collective":
        return collective.dial(address.collective, hello, SOON_S, SOON_S)
    return grpc_stream.dial(address.grpc, hello, SOON_S)


def _ffn_process(kind: str, pipe: Connection) -> None:
    with ffn_worker(kind) as worker:
        pipe.send(worker.port.address)
        pipe.poll(120)


def _attention_process(kind: str, address: FfnAddress, pipe: Connection) -> None:
    with attention(kind, [address]) as port:
        port.dispatch(0, 0, 0, tokens(4), None, None)
        pipe.send(collect(port).num_tokens)
        pipe.poll(120)


@contextmanager
def ffn_process(kind: str) -> Iterator[tuple[BaseProcess, FfnAddress]]:
    """A running FFN worker in a process of its own; killed at the end."""
    with _process(_ffn_process, (kind,)) as (process, address):
        assert isinstance(address, FfnAddress)
        yield process, address


@contextmanager
def attention_process(kind: str, address: FfnAddress) -> Iterator[BaseProcess]:
    """An attention worker in a process of its own, after its first round trip; killed at the end."""
    with _process(_attention_process, (kind, address)) as (process, count):
        assert count == 4
        yield process


@contextmanager
def _process(target: Callable[..., None], args: tuple[object, ...]) -> Iterator[tuple[BaseProcess, object]]:
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*args, there))
    process.start()
    there.close()
    try:
        assert here.poll(60), "the process did not start"
        yield process, here.recv()
    finally:
        here.close()
        process.kill()
        process.join(SOON_S)
        process.close()
