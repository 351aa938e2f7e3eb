"""One frame: a fixed, versioned, typed header with its tensors right behind it. No pickles, no string dtypes.

A frame on the wire is HEADER_BYTES of header, then the payload. All numbers are little-endian and unsigned.

offset  type  field
------  ----  -----------------------------------------------------------------------------------------------
     0  4 B   magic, the bytes "AFD" and 0
     4  u16   protocol version
     6  u8    kind: 1 dispatch, 2 combine, 3 error (FrameKind)
     7  u8    dtype of hidden: 1 float32, 2 bfloat16 (afd.types.DType); 0 without hidden
     8  u16   flags: none defined yet, 0
    10  u16   top_k; 0 without routing
    12  u32   attention_rank
    16  u32   ffn_rank
    20  u32   microbatch
    24  u32   layer
    28  u32   num_tokens
    32  u32   hidden_size; 0 without hidden
    36  u32   payload bytes
    40  u64   epoch
    48  u64   step
    56  u64   sequence
    64        payload: hidden [num_tokens, hidden_size], zeros up to a multiple of 4 bytes, expert_ids
              [num_tokens, top_k] int32, expert_weights [num_tokens, top_k] float32; of an error, its sentence in UTF-8

A dispatch always has hidden, and routing on MoE layers; a combine has hidden or nothing; an error has neither.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from afd.errors import FrameError
from afd.torch_dtypes import TORCH_DTYPES
from afd.types import DType

PROTOCOL_VERSION = 1
HEADER_BYTES = 64
MAX_MESSAGE_BYTES = 4096  # an error's sentence is cut here

Buffer = bytes | bytearray | memoryview

_MAGIC = b"AFD\0"
_HEADER = struct.Struct("<4sHBBHHIIIIIIIQQQ")
_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}

assert _HEADER.size == HEADER_BYTES, f"the header packs to {_HEADER.size} bytes"


class FrameKind(IntEnum):
    """What a frame is; the number is on the wire."""

    DISPATCH = 1
    COMBINE = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """A dispatch (attention → FFN), or the combine or error that answers it (FFN → attention).

    The answer repeats the dispatch's identity: epoch, ranks, microbatch, step, layer, sequence. `sequence` counts the
    dispatches of one link from 0. hidden is y or the partial sum, [num_tokens, hidden] in the link's dtype; None in a
    combine that adds nothing. expert_ids [num_tokens, top_k] int32 and expert_weights float32 come with dispatches of
    MoE layers. `message` is an error's sentence.
    """

    kind: FrameKind
    epoch: int
    attention_rank: int
    ffn_rank: int
    microbatch: int
    step: int
    layer: int
    sequence: int
    num_tokens: int
    hidden: Tensor | None = None
    expert_ids: Tensor | None = None
    expert_weights: Tensor | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the payload's parts lie, in bytes from the start of the frame."""

    ids: int
    weights: int
    end: int


def _layout(num_tokens: int, hidden_size: int, itemsize: int, top_k: int) -> _Layout:
    hidden_bytes = num_tokens * hidden_size * itemsize
    ids = HEADER_BYTES + (hidden_bytes + 3) // 4 * 4
    routing_bytes = num_tokens * top_k * 4
    return _Layout(ids, ids + routing_bytes, ids + 2 * routing_bytes)


def frame_bytes(num_tokens: int, hidden_size: int, dtype: DType, top_k: int) -> int:
    """Bytes of a frame with these sizes, header included."""
    return _layout(num_tokens, hidden_size, dtype.itemsize, top_k).end


def encode(frame: Frame) -> list[Buffer]:
    """The frame as buffers to be sent one behind the other: the header, then views of its tensors (copies only of
    tensors that are not contiguous or not on the CPU), valid as long as those are not written to."""
    header, layout, message = _header(frame)
    buffers: list[Buffer] = [header]
    if frame.hidden is not None:
        hidden = _bytes_of(frame.hidden)
        buffers += [hidden, bytes(layout.ids - HEADER_BYTES - hidden.nbytes)]
    if frame.expert_ids is not None and frame.expert_weights is not None:
        buffers += [_bytes_of(frame.expert_ids), _bytes_of(frame.expert_weights)]
    return [*buffers, message]


def write(frame: Frame, slot: memoryview) -> int:
    """Writes the frame to the start of `slot` with one copy of each tensor, from whatever device and strides it has.
    Returns the frame's bytes. Raises FrameError when the slot is too short."""
    header, layout, message = _header(frame)
    size = layout.end + len(message)
    if size > slot.nbytes:
        raise FrameError(f"a frame of {size} bytes does not fit the slot of {slot.nbytes} bytes")
    slot[:HEADER_BYTES] = header
    parts = ((frame.hidden, HEADER_BYTES), (frame.expert_ids, layout.ids), (frame.expert_weights, layout.weights))
    for tensor, offset in parts:
        if tensor is not None:
            _tensor(slot, tensor.dtype, offset, tensor.shape).copy_(tensor)
    slot[layout.end : size] = message
    return size


def decode(buffer: Buffer, max_bytes: int) -> Frame:
    """The frame in `buffer`, which must be exactly one. Its tensors are views of a writable buffer, and keep it alive;
    a read-only buffer is copied once (torch has no read-only tensors). Raises FrameError for anything malformed, and
    for frames over `max_bytes`; raises nothing else whatever the bytes are."""
    view = memoryview(buffer).cast("B")
    if view.nbytes > max_bytes:
        raise FrameError(f"a frame of {view.nbytes} bytes is over the link's limit of {max_bytes} bytes")
    if view.nbytes < HEADER_BYTES:
        raise FrameError(f"a frame of {view.nbytes} bytes is shorter than its header of {HEADER_BYTES} bytes")
    (magic, version, kind, dtype, flags, top_k, attention_rank, ffn_rank, microbatch, layer, num_tokens,
     hidden_size, payload_bytes, epoch, step, sequence) = _HEADER.unpack_from(view)  # fmt: skip
    if magic != _MAGIC:
        raise FrameError(f"a frame starts with {magic!r} instead of {_MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise FrameError(f"a frame has protocol version {version}; this side speaks {PROTOCOL_VERSION}")
    if flags:
        raise FrameError(f"a frame has flags {flags:#x}; protocol version {PROTOCOL_VERSION} defines none")
    if payload_bytes != view.nbytes - HEADER_BYTES:
        raise FrameError(f"a frame claims {payload_bytes} bytes of payload and carries {view.nbytes - HEADER_BYTES}")
    kind = _kind(kind, dtype, hidden_size, top_k)
    message, hidden, expert_ids, expert_weights = "", None, None, None
    if kind is FrameKind.ERROR:
        message = _message(view[HEADER_BYTES:])
    else:
        layout = _layout(num_tokens, hidden_size, DType(dtype).itemsize if dtype else 0, top_k)
        if layout.end != view.nbytes:
            raise FrameError(
                f"{num_tokens} tokens of hidden size {hidden_size}, dtype {dtype} and top_k {top_k} take "
                f"{layout.end} bytes; the frame has {view.nbytes}"
            )
        if view.readonly:
            view = _writable_copy(view)
        if dtype:
            hidden = _tensor(view, TORCH_DTYPES[DType(dtype)], HEADER_BYTES, (num_tokens, hidden_size))
        if top_k:
            expert_ids = _tensor(view, torch.int32, layout.ids, (num_tokens, top_k))
            expert_weights = _tensor(view, torch.float32, layout.weights, (num_tokens, top_k))
    return Frame(
        kind, epoch, attention_rank, ffn_rank, microbatch, step, layer, sequence, num_tokens,
        hidden, expert_ids, expert_weights, message,
    )  # fmt: skip


def _header(frame: Frame) -> tuple[bytes, _Layout, bytes]:
    """Header, layout and encoded message; asserts that the frame is one that `decode` accepts."""
    hidden, ids, weights, tokens = frame.hidden, frame.expert_ids, frame.expert_weights, frame.num_tokens
    assert (ids is None) == (weights is None), "expert_ids and expert_weights come together"
    assert hidden is not None or frame.kind is not FrameKind.DISPATCH, "a dispatch has hidden"
    assert hidden is None or frame.kind is not FrameKind.ERROR, "an error has no hidden"
    assert ids is None or frame.kind is FrameKind.DISPATCH, "only a dispatch has routing"
    dtype, hidden_size, top_k = 0, 0, 0
    if hidden is not None:
        assert hidden.dtype in _DTYPES, f"hidden is {hidden.dtype}; frames carry {', '.join(map(str, _DTYPES))}"
        dtype, hidden_size = _DTYPES[hidden.dtype], _columns("hidden", hidden, tokens)
    if ids is not None and weights is not None:
        assert ids.dtype == torch.int32, f"expert_ids are {ids.dtype}, not int32"
        assert weights.dtype == torch.float32, f"expert_weights are {weights.dtype}, not float32"
        assert ids.shape == weights.shape, f"expert_ids are {list(ids.shape)}, expert_weights {list(weights.shape)}"
        top_k = _columns("expert_ids", ids, tokens)
    assert not frame.message or frame.kind is FrameKind.ERROR, "only an error has a message"
    message = frame.message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore").encode()
    rows = tokens if frame.kind is not FrameKind.ERROR else 0
    layout = _layout(rows, hidden_size, DType(dtype).itemsize if dtype else 0, top_k)
    payload_bytes = layout.end - HEADER_BYTES + len(message)
    header = _HEADER.pack(
        _MAGIC, PROTOCOL_VERSION, frame.kind, dtype, 0, top_k, frame.attention_rank, frame.ffn_rank, frame.microbatch,
        frame.layer, tokens, hidden_size, payload_bytes, frame.epoch, frame.step, frame.sequence,
    )  # fmt: skip
    return header, layout, message


def _columns(name: str, tensor: Tensor, tokens: int) -> int:
    assert tensor.dim() == 2, f"{name} is {list(tensor.shape)}, not [tokens, n]"
    assert tensor.shape[0] == tokens, f"{name} has {tensor.shape[0]} rows, the frame {tokens} tokens"
    assert tensor.shape[1], f"{name} has no columns"
    return tensor.shape[1]


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


def _message(view: memoryview) -> str:
    if view.nbytes > MAX_MESSAGE_BYTES:
        raise FrameError(f"an error frame's message has {view.nbytes} bytes; the limit is {MAX_MESSAGE_BYTES}")
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise FrameError(f"an error frame's message is not UTF-8: {error}") from error


def _tensor(view: memoryview, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> Tensor:
    if not shape[0]:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(view, dtype=dtype, count=shape[0] * shape[1], offset=offset).view(shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().reshape(-1).data


def _writable_copy(view: memoryview) -> memoryview:
    copy = torch.empty(view.nbytes, dtype=torch.uint8).numpy().data
    copy[:] = view
    return copy
