"""The handshake over bytes of any kind. (Its refusals over real links: tests/contract/test_failures.py.)"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import HandshakeRefused
from afd.rpc import ffn_pb2
from afd.transport.base import Hello
from afd.transport.handshake import answer, check_welcome, hello_packet
from afd.transport.shape import PROTOCOL_VERSION
from afd.types import DType

SERVED = Hello(7, "sha256:0123", 0, 1, 2, 1, DType.BF16, DType.FP8, 30, 576, 8, 2, 512, 3)


def verdict(message: ffn_pb2.Hello) -> str:
    """The sentence that the attention side is told; "" for a welcome."""
    hello, packet = answer(SERVED, ffn_pb2.FromAttention(hello=message).SerializeToString())
    refusal = ffn_pb2.FromFfn.FromString(packet).welcome.refusal
    assert (hello is None) is bool(refusal)
    return str(refusal)


def test_what_is_agreed_is_what_the_attention_side_said() -> None:
    mine = replace(SERVED, attention_rank=9, max_tokens=100, microbatches=1)
    hello, welcome = answer(SERVED, hello_packet(mine))
    check_welcome(welcome, "ffn_rank 1")
    assert hello == mine


def test_every_field_of_hello_is_sent() -> None:
    sent = ffn_pb2.FromAttention.FromString(hello_packet(SERVED)).hello
    assert {field.name: getattr(sent, field.name) for field in sent.DESCRIPTOR.fields} == {
        "protocol_version": PROTOCOL_VERSION,
        **asdict(SERVED),
    }


@pytest.mark.parametrize("field", ["protocol_version", *asdict(SERVED)])
def test_every_field_but_the_attention_rank_is_compared(field: str) -> None:
    message = ffn_pb2.FromAttention.FromString(hello_packet(SERVED)).hello
    setattr(message, field, "other" if field == "model_digest" else getattr(message, field) + 1)
    refusal = verdict(message)
    assert bool(refusal) is (field != "attention_rank")
    if refusal:
        assert refusal.startswith("the ")


def test_another_protocol_version_is_told_before_anything_else() -> None:
    said = verdict(ffn_pb2.Hello(protocol_version=99, epoch=1))
    assert said.endswith(f"the protocol version of the attention side is 99, of this FFN worker {PROTOCOL_VERSION}")


def test_values_that_have_no_name_are_shown_too() -> None:
    message = ffn_pb2.FromAttention.FromString(hello_packet(SERVED)).hello
    message.dtype = 77
    assert verdict(message).endswith("activation dtype of the attention side is number 77, of this FFN worker BF16")
    message.model_digest = ""
    assert verdict(message).endswith("model digest of the attention side is empty, of this FFN worker sha256:0123")


@given(st.binary(max_size=60))
def test_any_first_message_gets_an_answer(packet: bytes) -> None:
    hello, welcome = answer(SERVED, packet)
    assert hello is None
    with pytest.raises(HandshakeRefused, match="ffn_rank 1 refused the connection: "):
        check_welcome(welcome, "ffn_rank 1")


@pytest.mark.parametrize("packet", [b"", b"\xff" * 9, ffn_pb2.FromFfn(frame=b"x").SerializeToString()])
def test_an_answer_that_is_no_welcome_is_refused(packet: bytes) -> None:
    with pytest.raises(HandshakeRefused, match=f"answered the handshake with {len(packet)} bytes that are no Welcome"):
        check_welcome(packet, "ffn_rank 1")
