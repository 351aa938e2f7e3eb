"""Which transport a pair of workers uses, and what is said when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from afd.errors import ConfigError, HandshakeRefused, TransportError
from afd.transport.attention_port import AttentionPort
from afd.transport.local import Faults
from afd.transport.registry import NAMES, host_key
from afd.transport.shm import ShmLink
from afd.types import FfnAddress
from tests.contract.pairs import HELLO, attention, collect, ffn_worker, open_ffn, tokens


def link_of(port: AttentionPort) -> str:
    return type(port._all[0].link).__module__.rsplit(".", 1)[-1]


def test_auto_shares_memory_on_one_host() -> None:
    with ffn_worker("auto") as ffn, attention("auto", [ffn.port.address]) as port:
        assert isinstance(port._all[0].link, ShmLink)
        port.dispatch(0, 0, 0, tokens(2), None, None)
        assert collect(port).num_tokens == 2


def test_auto_uses_grpc_to_another_host() -> None:
    with ffn_worker("auto") as ffn:
        elsewhere = replace(ffn.port.address, host_key="another")
        with attention("auto", [elsewhere]) as port:
            assert link_of(port) == "grpc_stream"
            port.dispatch(0, 0, 0, tokens(2), None, None)
            assert collect(port).num_tokens == 2


def test_auto_uses_grpc_where_the_hosts_look_the_same_but_the_door_is_not_here() -> None:
    """As between two virtual machines of which one is a copy of the other: even their boot ids are equal."""
    with ffn_worker("auto") as ffn:
        copied = replace(ffn.port.address, shm="afd-door-of-the-other-machine")
        with attention("auto", [copied]) as port:
            assert link_of(port) == "grpc_stream"


def test_auto_uses_the_process_itself_where_it_can() -> None:
    with ffn_worker("inproc") as ffn, attention("auto", [ffn.port.address]) as port:
        assert link_of(port) == "local"


def test_one_attention_worker_may_reach_each_ffn_worker_another_way() -> None:
    hello = replace(HELLO, ep=3)
    with (
        ffn_worker("inproc", expected=replace(hello, ffn_rank=0)) as a,
        ffn_worker("shm", expected=replace(hello, ffn_rank=1)) as b,
        ffn_worker("grpc", expected=replace(hello, ffn_rank=2)) as c,
        attention("auto", [w.port.address for w in (a, b, c)], hello) as port,
    ):
        for step in range(5):
            port.dispatch(0, step, 0, tokens(2), None, None)
            assert {collect(port).ffn_rank for _ in range(3)} == {0, 1, 2}


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    choices = ", ".join(NAMES)
    assert NAMES == ("auto", "inproc", "shm", "grpc", "collective")
    for call in (lambda: open_ffn("tcp"), lambda: attention("tcp", [FfnAddress(0)]).__enter__()):
        with pytest.raises(ConfigError, match=rf"no transport 'tcp' \(transport.kind\); choose one of {choices}"):
            call()


@pytest.mark.parametrize("kind", ["shm", "grpc", "collective", "auto"])
def test_faults_are_for_the_inproc_transport_only(kind: str) -> None:
    with pytest.raises(ConfigError, match="faults are the inproc transport's"):
        open_ffn(kind, faults=Faults())


def test_shared_memory_to_another_host_is_refused_with_a_way_out() -> None:
    address = FfnAddress(0, "another", shm="afd-x")
    with pytest.raises(TransportError, match=r"ffn_rank 0 cannot be reached by shm .*; try auto") as caught:
        attention("shm", [address]).__enter__()
    assert caught.value.peer == "ffn_rank 0"
    with pytest.raises(TransportError, match="ffn_rank 0 can be reached by no transport"):
        attention("auto", [address]).__enter__()


def test_an_ffn_rank_without_address_is_an_error_and_not_a_smaller_sum() -> None:
    said = r"ffn_ranks \[0\]; EP 2 times TP 1 needs \[0, 1\]"
    with ffn_worker("inproc", expected=replace(HELLO, ep=2)) as ffn, pytest.raises(TransportError, match=said):
        attention("inproc", [ffn.port.address], replace(HELLO, ep=2)).__enter__()


def test_a_refusal_by_the_second_worker_closes_the_first() -> None:
    hello = replace(HELLO, ep=2)
    with (
        ffn_worker("inproc", expected=hello) as first,
        ffn_worker("inproc", expected=replace(hello, ffn_rank=1, epoch=9)) as second,
    ):
        with pytest.raises(HandshakeRefused, match="ffn_rank 1 refused"):
            attention("inproc", [first.port.address, second.port.address], hello).__enter__()
        while first.port.connected:
            pass


def test_host_key_is_the_same_whenever_asked() -> None:
    assert host_key() == host_key() != ""
