"""Clients that babble or say nothing, ports that are taken, and what is left when everybody is gone."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch.distributed

from afd.credentials import Credentials
from afd.errors import HandshakeRefused, TransportError
from afd.rpc import secure
from afd.transport import grpc_stream, shm
from afd.transport.attention_port import AttentionPort
from afd.transport.envelope import wrap
from afd.transport.frame import Frame, FrameKind, encode
from afd.transport.handshake import hello_packet
from afd.transport.shm_link import Region
from tests import raw_grpc
from tests.contract.pairs import (
    HELLO,
    KINDS,
    SOON_S,
    FfnThread,
    attention,
    collect,
    double,
    ffn_process,
    ffn_worker,
    open_ffn,
    raw_dial,
    tokens,
)

dist: Any = torch.distributed  # its type stubs lack half of what is used here


def works(port: AttentionPort, step: int = 0) -> None:
    port.dispatch(0, step, 0, tokens(3), None, None)
    assert collect(port).num_tokens == 3


def seqpacket(address: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(SOON_S)
    while True:
        try:
            client.connect(f"\0{address}")
            return client
        except BlockingIOError:  # as many wait at the door already as the kernel lets
            time.sleep(0.001)


def test_garbage_on_the_shm_socket_gets_a_refusal_and_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with ffn_worker("shm") as ffn, attention("shm", [ffn.port.address]) as port:
        for garbage in (b"\xff" * 500, b"x", b"\x0a\x00", b"\x00" * 60_000):
            with seqpacket(ffn.port.address.shm) as client:
                client.send(garbage)
                assert b"is not a Hello" in client.recv(1000)
                assert client.recv(1000) == b""
        works(port)
    assert "refused a connection: its first message, 500 bytes, is not a Hello" in caplog.text


REGION = Region.of(HELLO)


@contextmanager
def shm_client(address: str) -> Iterator[tuple[socket.socket, memoryview]]:
    """A bare client after its handshake, and the start of the region, which holds the queue of dispatches."""
    with seqpacket(address) as client:
        client.send(hello_packet(replace(HELLO, attention_rank=5)))
        _, fds, _, _ = socket.recv_fds(client, 1000, 1)
        memory = memoryview(mmap.mmap(fds[0], REGION.queue_bytes))
        os.close(fds[0])
        yield client, memory


def is_cut_off(client: socket.socket) -> bool:
    """Waits for the end, which is a reset where the other side left something unread."""
    try:
        return client.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("packet", "entry", "said"),
    [
        (b"", None, "attention_rank 5 is gone"),
        (b"xxx", None, "doorbell of more than one byte"),
        (b"x", 3 << 32 | 64, "filled slot 3; the link has 3"),
        (b"x", 0x7FFFFFFF, f"a frame of 2147483647 bytes does not fit the slot of {REGION.dispatch_bytes} bytes"),
        (b"x", 64, "a frame starts with"),
        (b"x", 63, "a frame of 63 bytes is shorter than its header"),
        (b"x", 2**64 - 1, "filled slot 4294967295"),
    ],
)
def test_an_entry_or_doorbell_that_makes_no_sense_cuts_off_its_sender_only(
    packet: bytes, entry: int | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ffn_worker("shm") as ffn, attention("shm", [ffn.port.address]) as port:
        with shm_client(ffn.port.address.shm) as (client, memory):
            if entry is not None:
                REGION.queue(memory, 0).put(entry)
            with suppress(BrokenPipeError):  # a worker that polls has seen the entry already
                client.send(packet)
            assert is_cut_off(client)
        works(port)
    assert said in caplog.text
    assert "attention_rank 5" in caplog.text


@pytest.mark.parametrize("count", [7, 2**63, 2**64 - 1])
def test_a_queue_that_claims_too_much_cuts_off_its_sender_only(count: int, caplog: pytest.LogCaptureFixture) -> None:
    with ffn_worker("shm") as ffn, attention("shm", [ffn.port.address]) as port:
        with shm_client(ffn.port.address.shm) as (client, memory):
            memory.cast("Q")[0] = count
            with suppress(BrokenPipeError):  # a worker that polls has seen it already
                client.send(b"x")
            assert is_cut_off(client)
        works(port)
    assert f"attention_rank 5: a queue of 6 entries claims to hold {count}" in caplog.text


def test_silent_shm_clients_stall_nobody_and_are_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_HANDSHAKE_S", 0.2)
    with ffn_worker("shm") as ffn:
        silent = [seqpacket(ffn.port.address.shm) for _ in range(5)]
        start = time.monotonic()
        with attention("shm", [ffn.port.address]) as port:
            assert time.monotonic() - start < 1.0
            works(port)
            time.sleep(0.3)
            works(port, 1)
            for client in silent:
                assert client.recv(10) == b""
                client.close()


def test_more_silent_shm_clients_than_fit_the_door_push_each_other_out() -> None:
    with ffn_worker("shm") as ffn:
        silent = [seqpacket(ffn.port.address.shm) for _ in range(2 * shm._MAX_PENDING)]
        with attention("shm", [ffn.port.address]) as port:
            works(port)
        for client in silent:
            client.close()


def test_another_users_process_is_refused_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with ffn_worker("shm") as ffn:
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        with pytest.raises(TransportError, match=f"ffn_rank 0 runs as user {user}, this process as user {user + 1}"):
            raw_dial("shm", ffn.port.address)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_another_users_process_is_shown_out_of_the_shm_door(caplog: pytest.LogCaptureFixture) -> None:
    script = (
        "import socket, sys\n"
        "client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "client.connect('\\0' + sys.argv[1])\n"
        "try:\n"
        "    client.send(bytes.fromhex(sys.argv[2]))\n"
        "    print(client.recv(1000))\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    python = ["/usr/bin/env", "-i", "/usr/bin/python3", "-c", script]  # the tests' own may lie where only root reads
    hello = hello_packet(replace(HELLO, attention_rank=5)).hex()
    with ffn_worker("shm") as ffn, attention("shm", [ffn.port.address]) as port:
        command = [*python, ffn.port.address.shm, hello]
        done = subprocess.run(command, user=65534, cwd="/", capture_output=True, text=True, timeout=SOON_S)
        assert done.stdout.strip() in ("b''", "Broken pipe", "Connection reset by peer"), done.stderr
        works(port)
        assert ffn.port.connected == {0}
    assert "a shared-memory client runs as user 65534, this process as user 0" in caplog.text


def test_memory_that_its_maker_could_take_away_is_refused() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind("\0afd-test-unsealed")
        door.listen()

        def impostor() -> None:
            client, _ = door.accept()
            with client:
                client.recv(1000)
                fd = os.memfd_create("unsealed")
                os.ftruncate(fd, 10)
                socket.send_fds(client, [b"\x12\x00"], [fd])
                os.close(fd)

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(TransportError, match=r"ffn_rank 0 offered 10 bytes of memory; .* sealed"):
            shm.dial("afd-test-unsealed", HELLO, SOON_S, SOON_S)
        thread.join()


@pytest.mark.parametrize("lacking", [(os, "memfd_create"), (socket, "SO_PEERCRED")])
def test_a_platform_without_what_shm_needs_says_so(
    monkeypatch: pytest.MonkeyPatch, lacking: tuple[object, str]
) -> None:
    monkeypatch.delattr(*lacking)  # type: ignore[arg-type]
    with pytest.raises(TransportError, match=f"{lacking[1]}; use transport.kind grpc"):
        open_ffn("shm")
    with pytest.raises(TransportError, match=r"not available: .*; use transport.kind grpc"):
        shm.dial("afd-nobody", HELLO, 1.0, 1.0)
    port = open_ffn("auto")
    assert port.address.shm == ""
    assert port.address.grpc
    port.close()


def test_garbage_on_the_grpc_port_disturbs_nobody() -> None:
    with ffn_worker("grpc") as ffn, attention("grpc", [ffn.port.address]) as port:
        host, number = ffn.port.address.grpc.split(":")
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(5000),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(500),
        ):
            with socket.create_connection((host, int(number)), timeout=SOON_S) as client:
                client.sendall(garbage)
        works(port)


def test_a_grpc_client_that_sends_no_hello_is_refused_and_disturbs_nobody() -> None:
    with ffn_worker("grpc") as ffn, attention("grpc", [ffn.port.address]) as port:
        with grpc.insecure_channel(ffn.port.address.grpc) as channel:
            exchange = channel.stream_stream("/afd.rpc.Ffn/Exchange")
            for first in (b"", b"\xff" * 40, b"\x0a\x03abc"):
                assert b"is not a Hello" in b"".join(exchange(iter([first])))
            assert list(exchange(iter([]))) == []
        works(port)


@pytest.mark.parametrize(
    "message", [b"", b"\xff" * 40, b"\x12\x02\x08\x01", b"\x0a\x03abc", b"\x0a\xff\xff\xff\xff\xff\xff"]
)
def test_a_grpc_message_that_is_no_frame_cuts_off_its_sender_only(
    message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with ffn_worker("grpc") as ffn, attention("grpc", [ffn.port.address]) as port:
        with grpc.insecure_channel(ffn.port.address.grpc) as channel:
            more = threading.Event()

            def requests():  # type: ignore[no-untyped-def]
                yield hello_packet(replace(HELLO, attention_rank=5))
                yield message
                more.wait(SOON_S)

            assert len(list(channel.stream_stream("/afd.rpc.Ffn/Exchange")(requests()))) == 1
            more.set()
        works(port)
    assert "attention_rank 5" in caplog.text
    assert "frame" in caplog.text


EXCHANGE = "/afd.rpc.Ffn/Exchange"


def test_a_grpc_client_that_does_not_read_its_answers_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    """They would pile up: gRPC sends no more than the client takes."""
    y, hello = tokens(HELLO.max_tokens), replace(HELLO, attention_rank=5)
    with ffn_worker("grpc") as ffn, attention("grpc", [ffn.port.address]) as port:
        with grpc.insecure_channel(ffn.port.address.grpc) as channel:
            cut = threading.Event()

            def requests() -> Iterator[bytes]:
                yield hello_packet(hello)
                for sequence in range(100_000):  # as many as its buffers take, and more
                    if cut.wait(0.0005):
                        return
                    microbatch = sequence % HELLO.microbatches
                    identity = (HELLO.epoch, 5, 0, microbatch, 0, 0, sequence)
                    dispatch = Frame(FrameKind.DISPATCH, *identity, len(y), y, None, None)
                    yield wrap(encode(dispatch))

            call = channel.stream_stream(EXCHANGE)(requests())
            end = time.monotonic() + SOON_S
            while "attention_rank 5 does not read" not in caplog.text:
                assert time.monotonic() < end, caplog.text
                time.sleep(0.02)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            cut.set()
            assert caught.value.code() is grpc.StatusCode.CANCELLED
        works(port)
    assert f"attention_rank 5 does not read: {HELLO.microbatches + 1} frames wait for it" in caplog.text


def test_grpc_clients_that_stop_half_way_are_shown_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (secure, grpc_stream):
        monkeypatch.setattr(module, "HANDSHAKE_S" if module is secure else "_HANDSHAKE_S", 0.5)
    with ExitStack() as stack:
        ffn = stack.enter_context(ffn_worker("grpc"))
        port = stack.enter_context(attention("grpc", [ffn.port.address]))
        address = ffn.port.address.grpc
        halves = (b"", b"PRI", raw_grpc.PREFACE)  # no byte, half a preface, a preface without settings
        clients = [stack.enter_context(raw_grpc.connection(address, SOON_S)) for _ in range(20 * len(halves))]
        for client, half in zip(clients, halves * 20, strict=True):
            client.sendall(half)
        speechless = stack.enter_context(raw_grpc.connection(address, SOON_S))
        raw_grpc.call(speechless, EXCHANGE, ())
        works(port)
        assert all(raw_grpc.is_ended(client) for client in [*clients, speechless])
        works(port, 1)
    assert "said nothing for 0.5 s and was shown out" in caplog.text


@pytest.mark.parametrize("claimed", [2**31 - 1, 2**32 - 1, HELLO.dispatch_bytes + 2000])
def test_a_grpc_message_that_claims_to_be_larger_than_a_frame_can_be_is_not_waited_for(claimed: int) -> None:
    with ffn_worker("grpc") as ffn, attention("grpc", [ffn.port.address]) as port:
        with raw_grpc.connection(ffn.port.address.grpc, SOON_S) as client:
            raw_grpc.call(client, EXCHANGE, (), raw_grpc.message_of(claimed, bytes(1000)))
            assert raw_grpc.is_ended(client)
        works(port)


def test_a_grpc_message_larger_than_a_frame_can_be_is_refused_with_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    with ffn_worker("grpc") as ffn, attention("grpc", [ffn.port.address]) as port:
        requests = iter([hello_packet(replace(HELLO, attention_rank=5)), bytes(1 << 20)])
        with grpc.insecure_channel(ffn.port.address.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(EXCHANGE)(requests))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max (1048576 vs." in (caught.value.details() or "")
        works(port)
        settle(lambda: int("attention_rank 5 is gone" not in caplog.text), 0)


def test_garbage_on_the_collective_port_disturbs_nobody() -> None:
    with ffn_worker("collective") as ffn, attention("collective", [ffn.port.address]) as port:
        host, number = ffn.port.address.collective.rsplit(":", 1)
        for garbage in (b"\xff" * 500, b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 60_000, b""):
            stranger = socket.create_connection((host, int(number)), SOON_S)
            with stranger, suppress(ConnectionError):  # shown out while it still talks
                stranger.sendall(garbage)
            works(port)
        with attention("collective", [ffn.port.address], replace(HELLO, attention_rank=1)) as another:
            works(another)


def test_a_knock_at_the_collective_door_that_is_no_hello_gets_a_refusal_and_disturbs_nobody() -> None:
    with ffn_worker("collective") as ffn, attention("collective", [ffn.port.address]) as port:
        host, number = ffn.port.address.collective.rsplit(":", 1)
        store = dist.TCPStore(host, int(number), is_master=False, wait_for_workers=False)
        for garbage in (b"", b"\xff" * 500, b"0123456789abcdef", b"0123456789abcdef" + b"\xff" * 500):
            store.queue_push("knocks", garbage)
        assert b"is not a Hello" in store.get("0123456789abcdef/welcome")
        works(port)
        with attention("collective", [ffn.port.address], replace(HELLO, attention_rank=1)) as another:
            works(another)


@pytest.mark.parametrize(
    ("bind", "said"),
    [
        ("127.0.0.1:99999", "give an address, or address:port"),
        ("", "give an address, or address:port"),
        ("127.0.0.1:http", "give an address, or address:port"),
        ("192.0.2.1", "cannot listen on 192.0.2.1 (transport.bind): Cannot assign requested address"),
    ],
)
def test_an_address_that_cannot_be_bound_is_named(bind: str, said: str) -> None:
    with pytest.raises(TransportError) as caught:
        open_ffn("grpc", bind=bind, credentials=Credentials("a token for this test"))
    assert said in str(caught.value)


def test_a_port_that_is_taken_is_named_and_nothing_stays_open() -> None:
    first = open_ffn("grpc")
    for kind in ("grpc", "auto"):
        with pytest.raises(TransportError) as caught:
            open_ffn(kind, bind=first.address.grpc)
        assert str(caught.value) == (
            f"ffn_rank 0 cannot listen on {first.address.grpc} (transport.bind): Address already in use"
        )
    first.close()
    second = open_ffn("grpc", bind=first.address.grpc)
    assert second.address.grpc == first.address.grpc
    second.close()


def test_an_ffn_worker_that_starts_late_is_waited_for() -> None:
    first = open_ffn("grpc")
    first.close()
    late: list[FfnThread] = []

    def start_late() -> None:
        time.sleep(0.3)
        late.append(FfnThread(open_ffn("grpc", bind=first.address.grpc), double))

    starter = threading.Thread(target=start_late)
    starter.start()
    with attention("grpc", [first.address]) as port:
        works(port)
    starter.join()
    late[0].stop()
    late[0].port.close()


@pytest.mark.parametrize("kind", ["shm", "grpc", "collective"])
def test_a_pair_of_workers_listens_at_its_address_alone(kind: str) -> None:
    def ports() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections("inet")
        return {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}

    before = ports()
    with ffn_worker(kind) as ffn, attention(kind, [ffn.port.address]) as port:
        works(port)
        opened = ports() - before
    assert {ip for ip, _ in opened} == ({"127.0.0.1"} if kind != "shm" else set())


# --- what is left ---


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def settle(count, limit: int) -> None:  # type: ignore[no-untyped-def]
    """Other threads may still be closing theirs."""
    end = time.monotonic() + SOON_S
    while count() > limit and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
    assert count() <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_open_after_connections_refusals_and_losses(kind: str) -> None:
    def once() -> None:
        with ffn_worker(kind) as ffn:
            with attention(kind, [ffn.port.address]) as port:
                works(port)
            with pytest.raises(HandshakeRefused):
                attention(kind, [ffn.port.address], replace(HELLO, epoch=1)).__enter__()
            with attention(kind, [ffn.port.address]):
                ffn.stop()
                ffn.port.close()

    once()
    gc.collect()
    files, threads, shared = open_files(), threading.active_count(), set(os.listdir("/dev/shm"))
    for _ in range(5):
        once()
    settle(open_files, files)
    settle(threading.active_count, threads)
    assert set(os.listdir("/dev/shm")) <= shared


def test_a_killed_process_leaves_no_file_and_no_socket_behind() -> None:
    shared, temporary = set(os.listdir("/dev/shm")), set(os.listdir("/tmp"))
    with ffn_process("shm") as (process, address), attention("shm", [address]) as port:
        works(port)
        assert f"@{address.shm}" in Path("/proc/net/unix").read_text()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(SOON_S)
    assert f"@{address.shm}" not in Path("/proc/net/unix").read_text()
    assert set(os.listdir("/dev/shm")) <= shared
    assert not [name for name in set(os.listdir("/tmp")) - temporary if "afd-" in name]


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
