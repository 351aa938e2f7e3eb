"""Who may talk gRPC to a worker: those with the cluster's token, and with its certificates where it has some."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest

from afd.credentials import OPEN, Credentials
from afd.errors import PeerLost, PeerTimeout, TransportError, Unauthenticated
from afd.rpc import attention_pb2 as pb
from afd.rpc import secure
from afd.rpc.attention_client import AttentionClient
from afd.rpc.convert import AttentionStatus
from attention_worker.service import Service
from tests import certificates
from tests.contract.pairs import HELLO, SOON_S, attention, collect, ffn_worker, open_ffn, tokens

OURS, THEIRS = Credentials("the token of this cluster"), Credentials("the token of another")


@contextmanager
def door(credentials: Credentials = OURS, deadline_s: float = SOON_S) -> Iterator[tuple[Service, str]]:
    """An attention worker's door to routers, without an engine behind it; and its host:port."""
    service = Service(lambda: pb.StatusReply(state="ready"), "127.0.0.1", credentials, deadline_s)
    try:
        yield service, service.start()
    finally:
        service.stop()


def status(address: str, credentials: Credentials, deadline_s: float = SOON_S) -> AttentionStatus:
    async def ask() -> AttentionStatus:
        client = await AttentionClient.connect(
            address, peer="attention worker 0", deadline_s=deadline_s, credentials=credentials
        )
        try:
            return await client.status(deadline_s=deadline_s)
        finally:
            await client.close()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("shown", "said"),
    [(THEIRS, "its cluster token is another cluster's"), (OPEN, "it came without the cluster's token")],
)
def test_without_the_clusters_token_neither_door_opens_and_nobody_else_is_disturbed(
    shown: Credentials, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        ffn_worker("grpc", credentials=OURS) as ffn,
        attention("grpc", [ffn.port.address], credentials=OURS) as port,
    ):
        with pytest.raises(Unauthenticated, match=f"^ffn_rank 0 refused the connection on grpc:.*: {said}"):
            attention("grpc", [ffn.port.address], replace(HELLO, attention_rank=1), credentials=shown).__enter__()
        port.dispatch(0, 0, 0, tokens(3), None, None)
        assert collect(port).num_tokens == 3
        assert ffn.port.connected == {0}
    with door() as (_, address):
        with pytest.raises(Unauthenticated, match=f"^attention worker 0 refused the connection on .*: {said}"):
            status(address, shown)
        assert status(address, OURS).state == "ready"
    assert "refused a call of ipv4:127.0.0.1:" in caplog.text
    assert not any(token in caplog.text for token in (OURS.token, THEIRS.token))


def test_a_routers_stream_with_the_wrong_token_ends_with_the_workers_sentence() -> None:
    async def why(address: str) -> str:
        lost = asyncio.Event()
        client = await AttentionClient.connect(
            address, peer="attention worker 0", deadline_s=SOON_S, on_lost=lost.set, credentials=THEIRS
        )
        await asyncio.wait_for(lost.wait(), SOON_S)
        await client.close()
        return client.lost

    with door() as (_, address):
        assert "its cluster token is another cluster's" in asyncio.run(why(address))


@pytest.mark.parametrize("method", ["/afd.rpc.Ffn/Exchange", "/afd.rpc.Ffn/Nothing", "/afd.rpc.Attention/Serve", "/x"])
def test_a_stranger_does_not_learn_which_methods_there_are(method: str) -> None:
    with ffn_worker("grpc", credentials=OURS) as ffn, door() as (_, address):
        for target in (ffn.port.address.grpc, address):
            with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream(method)(iter([b"x"]), metadata=secure.metadata(THEIRS), timeout=SOON_S))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "sent",
    [
        (("afd-cluster-token", ""),),
        (("afd-cluster-token", OURS.token[:-1]),),
        (("afd-cluster-token", OURS.token.upper()),),
        (("afd-cluster-token", OURS.token), ("afd-cluster-token", THEIRS.token)),
        (("afd-cluster-token-bin", OURS.token.encode()),),
        (("authorization", f"Bearer {OURS.token}"),),
    ],
)
def test_almost_the_token_is_not_the_token(sent: secure.Metadata) -> None:
    with door() as (_, address), grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/afd.rpc.Attention/Status")
        assert ask(b"", metadata=secure.metadata(OURS), timeout=SOON_S)
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"", metadata=sent, timeout=SOON_S)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "[::]"])
def test_nothing_stands_open_where_other_machines_reach(bind: str) -> None:
    with pytest.raises(TransportError, match=r"without a cluster token or transport\.tls$"):
        open_ffn("grpc", bind=bind)
    service = Service(pb.StatusReply, bind)
    try:
        with pytest.raises(TransportError, match=r"without a cluster token or transport\.tls$"):
            service.start()
    finally:
        service.stop()


@pytest.mark.parametrize(
    ("host", "so"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.0.2.1", False), ("no.such.host.invalid", False)],
)  # fmt: skip
def test_what_is_loopback_is_told(host: str, so: bool) -> None:
    assert secure.is_loopback(host) is so


# --- certificates ---


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> certificates.Authority:
    return certificates.authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> certificates.Authority:
    return certificates.authority(tmp_path_factory.mktemp("theirs"), "theirs")


def test_with_certificates_of_one_authority_both_doors_open(ours: certificates.Authority) -> None:
    mine = replace(OURS, tls=ours.gives("worker", "IP:127.0.0.1"))
    with ffn_worker("grpc", credentials=mine) as ffn, attention("grpc", [ffn.port.address], credentials=mine) as port:
        port.dispatch(0, 0, 0, tokens(3), None, None)
        assert collect(port).num_tokens == 3
    with door(mine) as (_, address):
        assert status(address, mine).state == "ready"
        with pytest.raises(Unauthenticated, match="its cluster token is another cluster's"):
            status(address, replace(mine, token=THEIRS.token))


def test_who_shows_no_certificate_or_another_authoritys_is_not_let_in(
    ours: certificates.Authority, theirs: certificates.Authority
) -> None:
    mine = replace(OURS, tls=ours.gives("worker", "IP:127.0.0.1"))
    forged = replace(OURS, tls=theirs.gives("forged", "IP:127.0.0.1", ca=ours.ca))
    with ffn_worker("grpc", credentials=mine) as ffn, door(mine) as (_, address):
        for shown in (OURS, forged):
            with pytest.raises((PeerLost, PeerTimeout), match="ffn_rank 0"):
                attention("grpc", [ffn.port.address], connect_s=0.2, credentials=shown).__enter__()
            with pytest.raises((PeerLost, PeerTimeout), match="attention worker 0"):
                status(address, shown, deadline_s=0.2)
        assert ffn.port.connected == frozenset()


def test_a_worker_whose_certificate_is_another_authoritys_or_another_names_is_not_talked_to(
    ours: certificates.Authority, theirs: certificates.Authority
) -> None:
    """Whoever took over a worker's address would get activations and the token."""
    mine = replace(OURS, tls=ours.gives("worker", "IP:127.0.0.1"))
    for impostor in (theirs.gives("impostor", "IP:127.0.0.1", ca=ours.ca), ours.gives("other", "IP:192.0.2.7")):
        with (
            ffn_worker("grpc", credentials=replace(OURS, tls=impostor)) as ffn,
            pytest.raises(Unauthenticated, match=r"^no TLS handshake with ffn_rank 0 on grpc:.*\(transport.tls\)"),
        ):
            attention("grpc", [ffn.port.address], credentials=mine).__enter__()


def test_one_certificate_for_all_machines_has_a_name(ours: certificates.Authority) -> None:
    shared = replace(OURS, tls=ours.gives("shared", "DNS:worker.afd", expects="worker.afd"))
    with ffn_worker("grpc", credentials=shared) as ffn, attention("grpc", [ffn.port.address], credentials=shared):
        pass
    with door(shared) as (_, address):
        assert status(address, shared).state == "ready"
