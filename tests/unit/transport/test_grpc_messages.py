"""The messages that are put together by hand are those of proto/afd/rpc/ffn.proto."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import FrameError, TransportError
from afd.rpc import ffn_pb2
from afd.transport.binding import split_bind
from afd.transport.envelope import unwrap, wrap

PARTS = st.lists(st.binary(max_size=300), max_size=4)


@given(PARTS)
def test_the_generated_classes_read_what_is_wrapped(parts: list[bytes]) -> None:
    for message in (ffn_pb2.FromAttention, ffn_pb2.FromFfn):
        assert message.FromString(wrap(list(parts))).frame == b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 2_097_151, 2_097_152])
def test_the_generated_classes_write_what_is_unwrapped(size: int) -> None:
    frame = bytes(size)
    for message in (ffn_pb2.FromAttention, ffn_pb2.FromFfn):
        assert unwrap(message(frame=frame).SerializeToString()) == frame
    assert unwrap(wrap([frame])) == frame


def test_legal_messages_unlike_ours_are_read_too() -> None:
    twice = ffn_pb2.FromFfn(frame=b"first").SerializeToString() + ffn_pb2.FromFfn(frame=b"last").SerializeToString()
    assert unwrap(twice) == b"last"


@given(st.binary(max_size=40))
def test_other_messages_are_a_frame_error_and_nothing_else(message: bytes) -> None:
    with suppress(FrameError):
        assert len(unwrap(message)) < len(message)


@pytest.mark.parametrize(
    ("bind", "host", "port"),
    [
        ("127.0.0.1", "127.0.0.1", 0),
        ("127.0.0.1:80", "127.0.0.1", 80),
        ("node-3.local:0", "node-3.local", 0),
        ("::1", "[::1]", 0),
        ("[::1]", "[::1]", 0),
        ("[::1]:80", "[::1]", 80),
    ],
)
def test_an_address_is_taken_with_and_without_port(bind: str, host: str, port: int) -> None:
    assert split_bind(bind) == (host, port)


@pytest.mark.parametrize("bind", ["", ":80", "host:", "host:x", "host:65536", "[::1", "[::1]:x"])
def test_what_is_no_address_is_refused(bind: str) -> None:
    with pytest.raises(TransportError, match=r"transport\.bind"):
        split_bind(bind)
