"""What kind of frame, and how large: the first 24 bytes of its header, and where its payload's parts lie.

Every frame of a microbatch's decode steps has the same shape, so both directions (shape to bytes, bytes to shape) are
remembered: bytes that were found good once cost one look into a dictionary.

offset  type  field
------  ----  -----------------------------------------------------------------------------------------------
     0  4 B   magic, the bytes "AFD" and 0
     4  u16   protocol version
     6  u8    kind: 1 dispatch, 2 combine, 3 error (FrameKind)
     7  u8    dtype of hidden: 1 float32, 2 bfloat16, 3 float8 e4m3 (afd.types.DType); 0 without hidden
     8  u16   flags: none defined yet, 0
    10  u16   top_k; 0 without routing
    12  u32   num_tokens
    16  u32   hidden_size; 0 without hidden
    20  u32   payload bytes
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

from afd.errors import FrameError
from afd.types import DType

PROTOCOL_VERSION = 2
HEADER_BYTES = 64
SHAPE_BYTES = 24
MAX_FRAME_BYTES = 2**32 - 1
MAX_MESSAGE_BYTES = 4096  # an error's sentence is cut here
SCALE_CHANNELS = 128  # channels of a token that share one scale, where hidden is float8

_MAGIC = b"AFD\0"
_STRUCT = struct.Struct("<4sHBBHHIII")
_REMEMBERED = 4096  # shapes; past it the least recently used are worked out anew

assert _STRUCT.size == SHAPE_BYTES, f"a shape packs to {_STRUCT.size} bytes"


class FrameKind(IntEnum):
    """What a frame is; the number is on the wire."""

    DISPATCH = 1
    COMBINE = 2
    ERROR = 3


def scale_groups(hidden_size: int) -> int:
    """Scales of one token whose hidden is float8; the last may stand for fewer channels."""
    return (hidden_size + SCALE_CHANNELS - 1) // SCALE_CHANNELS


@dataclass(frozen=True, slots=True, eq=False)  # looked up by identity: hashing the fields would cost a microsecond
class Shape:
    """The sizes of one frame. `dtype` is None without hidden, `top_k` 0 without routing; `groups` scales a token come
    with float8. `scales`, `ids`, `weights`: where those parts start, in bytes from the start of the frame, which has
    `end` bytes. `packed`: the header's first bytes, empty for what is
    over MAX_FRAME_BYTES."""

    kind: FrameKind
    dtype: DType | None
    num_tokens: int
    hidden_size: int
    top_k: int
    message_bytes: int
    groups: int = field(init=False)
    scales: int = field(init=False)
    ids: int = field(init=False)
    weights: int = field(init=False)
    end: int = field(init=False)
    packed: bytes = field(init=False)

    def __post_init__(self) -> None:
        rows = 0 if self.kind is FrameKind.ERROR else self.num_tokens
        groups = scale_groups(self.hidden_size) if self.dtype is DType.FP8 else 0
        hidden_bytes = rows * self.hidden_size * (self.dtype.itemsize if self.dtype else 0)
        scales = HEADER_BYTES + (hidden_bytes + 3) // 4 * 4
        ids = scales + rows * groups * 4
        weights = ids + rows * self.top_k * 4
        end = weights + rows * self.top_k * 4 + self.message_bytes
        derived = {"groups": groups, "scales": scales, "ids": ids, "weights": weights, "end": end}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "packed", self._pack() if end <= MAX_FRAME_BYTES else b"")

    def _pack(self) -> bytes:
        return _STRUCT.pack(
            _MAGIC, PROTOCOL_VERSION, self.kind, self.dtype or 0, 0, self.top_k, self.num_tokens, self.hidden_size,
            self.end - HEADER_BYTES,
        )  # fmt: skip


@lru_cache(_REMEMBERED)
def shape_of(
    kind: FrameKind, dtype: DType | None, num_tokens: int, hidden_size: int, top_k: int, message_bytes: int = 0
) -> Shape:
    """The shape with these sizes, which the caller knows to go together."""
    return Shape(kind, dtype, num_tokens, hidden_size, top_k, message_bytes)


def frame_bytes(num_tokens: int, hidden_size: int, dtype: DType, top_k: int) -> int:
    """Bytes of a frame with these sizes, header included."""
    return shape_of(FrameKind.DISPATCH, dtype, num_tokens, hidden_size, top_k).end


@lru_cache(_REMEMBERED)
def read_shape(packed: bytes, total_bytes: int) -> Shape:
    """The shape of a frame of `total_bytes`, of which `packed` are the first SHAPE_BYTES. Raises FrameError for all
    that `shape_of` would not have made, and nothing else whatever the bytes are."""
    magic, version, kind, dtype, flags, top_k, num_tokens, hidden_size, payload_bytes = _STRUCT.unpack(packed)
    if magic != _MAGIC:
        raise FrameError(f"a frame starts with {magic!r} instead of {_MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise FrameError(f"a frame has protocol version {version}; this side speaks {PROTOCOL_VERSION}")
    if flags:
        raise FrameError(f"a frame has flags {flags:#x}; protocol version {PROTOCOL_VERSION} defines none")
    if payload_bytes != total_bytes - HEADER_BYTES:
        raise FrameError(f"a frame claims {payload_bytes} bytes of payload and carries {total_bytes - HEADER_BYTES}")
    kind = _kind(kind, dtype, hidden_size, top_k)
    if kind is FrameKind.ERROR and payload_bytes > MAX_MESSAGE_BYTES:
        raise FrameError(f"an error frame's message has {payload_bytes} bytes; the limit is {MAX_MESSAGE_BYTES}")
    message_bytes = payload_bytes if kind is FrameKind.ERROR else 0
    shape = Shape(kind, DType(dtype) if dtype else None, num_tokens, hidden_size, top_k, message_bytes)
    if shape.end != total_bytes:
        raise FrameError(
            f"{num_tokens} tokens of hidden size {hidden_size}, dtype {dtype} and top_k {top_k} take "
            f"{shape.end} bytes; the frame has {total_bytes}"
        )
    return shape


def _kind(kind: int, dtype: int, hidden_size: int, top_k: int) -> FrameKind:
    """The kind, once dtype, hidden_size and top_k are known to go with it."""
    if kind not in FrameKind.__members__.values():
        raise FrameError(
            f"a frame has kind {kind}; known are {', '.join(f'{k.value} ({k.name.lower()})' for k in FrameKind)}"
        )
    if dtype and dtype not in DType.__members__.values():
        raise FrameError(f"a frame has dtype {dtype}; known are {', '.join(f'{d.value} ({d.name})' for d in DType)}")
    name = FrameKind(kind).name.lower()
    if bool(dtype) != bool(hidden_size):
        raise FrameError(f"a {name} frame has dtype {dtype} and hidden size {hidden_size}; both or neither are 0")
    if kind == FrameKind.DISPATCH and not dtype:
        raise FrameError("a dispatch frame has no hidden tensor")
    if kind != FrameKind.DISPATCH and top_k:
        raise FrameError(f"a {name} frame has top_k {top_k}; only a dispatch has routing")
    if kind == FrameKind.ERROR and dtype:
        raise FrameError("an error frame has a hidden tensor")
    return FrameKind(kind)
