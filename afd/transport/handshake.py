"""The handshake: what both sides must agree on before the first frame, and the sentence when they do not.

The attention side sends a Hello (proto/afd/rpc/ffn.proto), the FFN side answers with a Welcome. The same two messages
open every transport.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from afd.errors import HandshakeRefused
from afd.rpc import ffn_pb2
from afd.transport.base import Hello
from afd.transport.shape import PROTOCOL_VERSION
from afd.types import DType

_log = logging.getLogger(__name__)

_MUST_EQUAL = {
    "epoch": "run epoch",
    "model_digest": "model digest",
    "ffn_rank": "ffn_rank",
    "ep": "EP degree",
    "tp": "TP degree",
    "dtype": "activation dtype",
    "dispatch_dtype": "dispatch dtype",
    "num_layers": "number of layers",
    "hidden_size": "hidden size",
    "num_experts": "number of experts",
    "top_k": "top_k",
}
_LIMITS = {
    "max_tokens": ("tokens in a frame", "attention.max_batch_tokens"),
    "microbatches": ("microbatches", "attention.microbatches"),
}


def hello_packet(hello: Hello) -> bytes:
    """The attention side's first message."""
    message = ffn_pb2.Hello(protocol_version=PROTOCOL_VERSION, **asdict(hello))
    return _packed(ffn_pb2.FromAttention(hello=message))


def answer(expected: Hello, packet: bytes) -> tuple[Hello | None, bytes]:
    """The FFN side's verdict on the first message, whatever its bytes are: what was agreed and the Welcome to send, or
    None and a Welcome that refuses (which is logged here). `expected` is what this side serves; its attention_rank is
    not looked at, its max_tokens and microbatches are limits."""
    try:
        message = ffn_pb2.FromAttention.FromString(packet)
    except DecodeError:
        message = ffn_pb2.FromAttention()
    if message.HasField("hello"):
        who, refusal = f"attention_rank {message.hello.attention_rank}", _refusal(expected, message.hello)
    else:
        who, refusal = "a connection", f"its first message, {len(packet)} bytes, is not a Hello"
    if refusal:
        _log.warning("refused %s: %s", who, refusal)
        return None, _packed(ffn_pb2.FromFfn(welcome=ffn_pb2.Welcome(refusal=refusal)))
    agreed = replace(
        expected,
        attention_rank=message.hello.attention_rank,
        max_tokens=message.hello.max_tokens,
        microbatches=message.hello.microbatches,
    )
    return agreed, _packed(ffn_pb2.FromFfn(welcome=ffn_pb2.Welcome()))


def check_welcome(packet: bytes, peer: str) -> None:
    """The attention side's reading of the answer. Raises HandshakeRefused with the FFN side's sentence, or when the
    bytes are no Welcome."""
    try:
        message = ffn_pb2.FromFfn.FromString(packet)
    except DecodeError:
        message = ffn_pb2.FromFfn()
    if not message.HasField("welcome"):
        raise HandshakeRefused(f"{peer} answered the handshake with {len(packet)} bytes that are no Welcome", peer=peer)
    if message.welcome.refusal:
        raise HandshakeRefused(f"{peer} refused the connection: {message.welcome.refusal}", peer=peer)


def _refusal(expected: Hello, message: ffn_pb2.Hello) -> str:
    if message.protocol_version != PROTOCOL_VERSION:
        return _differs("protocol version", message.protocol_version, PROTOCOL_VERSION)
    for field, name in _MUST_EQUAL.items():
        theirs, ours = getattr(message, field), getattr(expected, field)
        if theirs != ours:
            return _differs(name, _shown(field, theirs), _shown(field, ours))
    for field, (name, knob) in _LIMITS.items():
        theirs, limit = getattr(message, field), getattr(expected, field)
        if not 1 <= theirs <= limit:
            return f"the attention side wants {theirs} {name}, this FFN worker takes 1 to {limit} ({knob})"
    return ""


def _differs(name: str, theirs: object, ours: object) -> str:
    return f"the {name} of the attention side is {theirs}, of this FFN worker {ours}"


def _shown(field: str, value: int | str) -> int | str:
    if field in ("dtype", "dispatch_dtype"):
        return next((d.name for d in DType if d == value), f"number {value}")
    return "empty" if value == "" else value


def _packed(message: ffn_pb2.FromAttention | ffn_pb2.FromFfn) -> bytes:
    return bytes(message.SerializeToString())
