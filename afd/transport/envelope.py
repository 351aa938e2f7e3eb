"""A frame as a serialized gRPC message of proto/afd/rpc/ffn.proto, put together and taken apart by hand.

A tag, a length, the frame: so its bytes are copied once and not parsed, and are used where gRPC put them.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from afd.errors import FrameError
from afd.rpc import ffn_pb2
from afd.transport.frame import Buffer

_FRAME_TAG = b"\x0a"  # field 1, length-delimited, of FromAttention and FromFfn alike
_PAD_TAG = b"\x1a"  # field 3, length-delimited, of both
_PREFIX_BYTES = 16  # what comes before the frame: so it lies aligned in the message, and its tensors in it


def wrap(frame: list[Buffer]) -> bytes:
    """An encoded frame as a serialized FromAttention or FromFfn (their fields have the same numbers), which it starts
    _PREFIX_BYTES into."""
    length = _varint(sum(memoryview(part).nbytes for part in frame))
    pad = _PREFIX_BYTES - 2 - len(_FRAME_TAG) - len(length)
    return b"".join([_PAD_TAG, bytes([pad]), bytes(pad), _FRAME_TAG, length, *frame])


def unwrap(message: bytes) -> memoryview:
    """The frame's bytes inside a serialized message. Raises FrameError when it carries none."""
    view = memoryview(message)
    start = 2 + message[1] if message[:1] == _PAD_TAG and len(message) > _PREFIX_BYTES else 0
    if message[start : start + 1] == _FRAME_TAG:
        length, start = _read_varint(message, start + 1)
        if start + length == len(message):
            return view[start:]
    try:  # Legal, if unlike what `wrap` makes: fields out of order, or sent twice.
        parsed = ffn_pb2.FromAttention.FromString(message)
    except DecodeError:
        parsed = ffn_pb2.FromAttention()
    if not parsed.HasField("frame"):
        raise FrameError(f"a gRPC message of {len(message)} bytes carries no frame")
    return memoryview(parsed.frame)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """A number of at most 5 bytes, and where it ends."""
    value = 0
    for shift, byte in enumerate(message[start : start + 5]):
        value |= (byte & 0x7F) << 7 * shift
        start += 1
        if byte < 0x80:
            break
    return value, start
