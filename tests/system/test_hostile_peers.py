"""Who reaches a running worker's ports and means no good, or breaks off half-way: refused or cut, each with a sentence,
while a stream beside it gives the tokens it gives in peace."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import httpx
import psutil
import pytest

from afd.credentials import Credentials
from afd.rpc import attention_pb2 as pb
from afd.rpc import ffn_pb2, secure
from tests import raw_grpc, tiny
from tests.system.serving import Serving, serving, until

OURS, THEIRS = Credentials("the-token-of-this-cluster"), Credentials("the-token-of-another-one")
DEADLINE_S = 3.0
DEPLOYMENT = """
transport: {{kind: grpc, deadline_s: {deadline_s}, token_file: {token_file}}}
cluster: {{backend: local}}
"""
SERVE, EXCHANGE = "/afd.rpc.Attention/Serve", "/afd.rpc.Ffn/Exchange"
DOORS = {"attention": SERVE, "ffn": EXCHANGE}
SOON_S = 15.0
TWO_GIB = 2**31 - 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("deployment")
    (folder / "token").write_text(f"{OURS.token}\n")
    settings = DEPLOYMENT.format(deadline_s=DEADLINE_S, token_file=folder / "token")
    (folder / "deployment.yaml").write_text(settings)
    with serving(tiny.write(folder / "tiny"), str(folder / "deployment.yaml")) as running:
        yield running
        until(lambda: running.blocks_used() == 0)  # nothing of whom it cut off is left
        assert not any("Traceback" in line for line in running.lines)


@pytest.fixture(scope="module")
def doors(server: Serving) -> dict[str, str]:
    """The address at which each role's worker takes gRPC."""
    found = {}
    for role in DOORS:
        [listening] = [
            c.laddr
            for c in psutil.Process(server.worker(role)["pid"]).net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        ]
        found[role] = f"{listening.ip.removeprefix('::ffff:')}:{listening.port}"
    return found


@pytest.fixture(scope="module", autouse=True)
def half_way(doors: dict[str, str]) -> Iterator[list[socket.socket]]:
    """A hundred connections to each door that say nothing, or half of what they should, while the other tests run; and
    a call that never says Hello."""
    halves = (b"", b"PRI * HT", raw_grpc.PREFACE, raw_grpc.PREFACE + raw_grpc.frame(raw_grpc.SETTINGS, 0, 0)[:5])
    with ExitStack() as stack:
        clients = []
        for address in doors.values():
            for half in halves * 25:
                clients.append(stack.enter_context(raw_grpc.connection(address, SOON_S)))
                clients[-1].sendall(half)
        clients.append(stack.enter_context(raw_grpc.connection(doors["ffn"], SOON_S)))
        raw_grpc.call(clients[-1], EXCHANGE, secure.metadata(OURS))
        yield clients


def tokens_of_a_stream(server: Serving, started: threading.Event) -> list[int]:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    found: list[int] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60.0) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = httpx.Response(200, text=line.removeprefix("data: ")).json()
                assert "error" not in chunk, chunk
                started.set()
                found += [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
    return found


@pytest.fixture(scope="module")
def in_peace(server: Serving) -> list[int]:
    return tokens_of_a_stream(server, threading.Event())


@pytest.fixture
def beside(server: Serving, in_peace: list[int]) -> Iterator[None]:
    """A stream that is under way when the test begins, and must end as it does in peace."""
    assert len(in_peace) == 150
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        stream = pool.submit(tokens_of_a_stream, server, started)
        assert started.wait(SOON_S)
        yield
        assert stream.result(60.0) == in_peace
    assert {worker["state"] for worker in server.status()["workers"]} == {"ready"}


def said(server: Serving, sentence: str) -> None:
    until(lambda: any(sentence in line for line in list(server.lines)))


@contextmanager
def calling(address: str, method: str, requests: Iterator[bytes], credentials: Credentials) -> Iterator[grpc.Call]:
    with grpc.insecure_channel(address, options=[("grpc.http2.bdp_probe", 0)]) as channel:  # and so takes 64 KiB ahead
        yield channel.stream_stream(method)(requests, metadata=secure.metadata(credentials), timeout=SOON_S)


def refusal(address: str, method: str, first: bytes, credentials: Credentials = OURS) -> tuple[grpc.StatusCode, str]:
    with calling(address, method, iter([first]), credentials) as call, pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code(), caught.value.details()


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("role", DOORS)
def test_a_wrong_token_is_refused(server: Serving, doors: dict[str, str], role: str) -> None:
    code, sentence = refusal(doors[role], DOORS[role], b"", THEIRS)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert sentence == "its cluster token is another cluster's (transport.token_file, AFD_CLUSTER_TOKEN)"
    said(server, sentence)


@pytest.mark.usefixtures("beside")
def test_an_old_protocol_version_is_refused(server: Serving, doors: dict[str, str]) -> None:
    hello = ffn_pb2.FromAttention(hello=ffn_pb2.Hello(protocol_version=1)).SerializeToString()
    with calling(doors["ffn"], EXCHANGE, iter([hello]), OURS) as call:
        [welcome] = list(call)
    assert "the protocol version of the attention side is 1, of this FFN worker" in str(welcome)
    said(server, "refused attention_rank 0: the protocol version")


@pytest.mark.usefixtures("beside")
def test_garbage_is_refused(server: Serving, doors: dict[str, str]) -> None:
    garbage = os.urandom(3000)
    with calling(doors["ffn"], EXCHANGE, iter([b"\xff" + garbage]), OURS) as call:
        assert b"its first message, 3001 bytes, is not a Hello" in b"".join(call)
    code, sentence = refusal(doors["attention"], SERVE, b"\xff" + garbage)
    assert (code, sentence) == (grpc.StatusCode.INVALID_ARGUMENT, "the router sent bytes that are no RouterMessage")
    for address in doors.values():
        for bytes_ in (garbage, raw_grpc.PREFACE + garbage):
            with raw_grpc.connection(address, SOON_S) as client:
                client.sendall(bytes_)
                assert raw_grpc.is_ended(client)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("role", DOORS)
def test_a_frame_of_two_gib_is_refused_when_it_is_announced(server: Serving, doors: dict[str, str], role: str) -> None:
    process = psutil.Process(server.worker(role)["pid"])
    before = process.memory_info().rss
    for metadata in (secure.metadata(OURS), ()):
        with raw_grpc.connection(doors[role], SOON_S) as client:
            raw_grpc.call(client, DOORS[role], metadata, raw_grpc.message_of(TWO_GIB, bytes(10_000)))
            assert raw_grpc.is_ended(client)
    assert process.memory_info().rss - before < 64 << 20
    code, sentence = refusal(doors[role], DOORS[role], bytes(17 << 20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"larger than max ({17 << 20} vs." in sentence


@pytest.mark.usefixtures("beside")
def test_a_router_that_takes_nothing_of_what_it_asked_for_is_cut_off(server: Serving, doors: dict[str, str]) -> None:
    asked, sentence = threading.Event(), f"the router took nothing for {DEADLINE_S:g} s (transport.deadline_s)"

    def requests() -> Iterator[bytes]:
        sampling = pb.Sampling(max_tokens=900, top_p=1.0, repetition_penalty=1.0, ignore_eos=True, logprobs=20)
        for i in range(40):
            submit = pb.Submit(request_id=str(i), handle=i + 1, prompt_token_ids=[5], sampling=sampling)
            yield pb.RouterMessage(submit=submit).SerializeToString()
        asked.wait(60.0)

    with calling(doors["attention"], SERVE, requests(), OURS) as call:
        said(server, sentence)
        until(lambda: server.worker("attention")["status"]["running"] <= 1)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        asked.set()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)


@pytest.mark.usefixtures("beside")
def test_connections_that_never_say_what_they_want_are_shown_out(
    server: Serving, half_way: list[socket.socket]
) -> None:
    assert all(raw_grpc.is_ended(client) for client in half_way)
    said(server, "said nothing for 5 s and was shown out")
