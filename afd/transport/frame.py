"""One frame: a fixed, versioned, typed header with its tensors right behind it. No pickles, no string dtypes.

A frame on the wire is HEADER_BYTES of header, then the payload. All numbers are little-endian and unsigned.

offset  type  field
------  ----  -----------------------------------------------------------------------------------------------
     0  24 B  kind and sizes (afd.transport.shape)
    24  u32   attention_rank
    28  u32   ffn_rank
    32  u32   microbatch
    36  u32   layer
    40  u64   epoch
    48  u64   step
    56  u64   sequence
    64        payload: hidden [num_tokens, hidden_size], zeros up to a multiple of 4 bytes; where hidden is float8,
              scales [num_tokens, hidden_size / 128 rounded up] float32; expert_ids [num_tokens, top_k] int32,
              expert_weights [num_tokens, top_k] float32; of an error, its sentence in UTF-8

A dispatch always has hidden, and routing on MoE layers; a combine has hidden or nothing; an error has neither.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afd.errors import FrameError
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport.shape import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    SHAPE_BYTES,
    FrameKind,
    Shape,
    read_shape,
    scale_groups,
    shape_of,
)
from afd.types import DType

__all__ = ["Buffer", "Frame", "FrameKind", "Slot", "decode", "encode", "peek"]

Buffer = bytes | bytearray | memoryview

_IDENTITY = struct.Struct("<IIIIQQQ")
_KIND_AT, _MICROBATCH_AT = 6, 32
_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}

assert SHAPE_BYTES + _IDENTITY.size == HEADER_BYTES, f"the identity packs to {_IDENTITY.size} bytes"


@dataclass(slots=True, eq=False)  # not frozen: that would cost six times as much to make
class Frame:
    """A dispatch (attention → FFN), or the combine or error that answers it (FFN → attention). Never changed once made.

    The answer repeats the dispatch's identity: epoch, ranks, microbatch, step, layer, sequence. `sequence` counts the
    dispatches of one link from 0. hidden is y or the partial sum, [num_tokens, hidden] in the link's dtype for that
    direction; None in a combine that adds nothing. scales [num_tokens, groups] float32 come with float8
    (afd.transport.float8). expert_ids [num_tokens, top_k] int32 and expert_weights float32 come with dispatches of MoE
    layers. `message` is an error's sentence.
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
    scales: Tensor | None = None

    @property
    def wire_bytes(self) -> int:
        """Bytes of the frame on the wire, header included."""
        return _shape(self).end


def encode(frame: Frame) -> list[Buffer]:
    """The frame as buffers to be sent one behind the other: the header, then views of its tensors (copies only of
    tensors that are not contiguous or not on the CPU), valid as long as those live and are not written to."""
    shape = _shape(frame)
    buffers: list[Buffer] = [_header(frame, shape)]
    if frame.hidden is not None:
        hidden = _bytes_of(frame.hidden)
        buffers += [hidden, bytes(shape.scales - HEADER_BYTES - hidden.nbytes)]
    buffers += [_bytes_of(t) for t in (frame.scales, frame.expert_ids, frame.expert_weights) if t is not None]
    return [*buffers, _message_bytes(frame)]


class Slot:
    """A piece of memory that holds one frame at a time, with the tensors that were ever seen in it.

    A tensor over memory takes longer to make than to copy into, and decode steps come in few sizes, so the last few
    sizes' tensors are kept. They keep the memory alive.
    """

    def __init__(self, memory: memoryview, on_device: Tensor | None = None) -> None:
        """`memory` must be writable. on_device [nbytes] uint8: where the tensors lie instead, if not in memory."""
        self.nbytes = memory.nbytes
        self._memory = memory
        self._bytes = np.frombuffer(memory, np.uint8) if on_device is None else on_device  # [nbytes]
        self._known: dict[Shape, _Parts] = {}

    def write(self, frame: Frame) -> int:
        """Writes the frame with one copy of each tensor, from whatever device and strides it has. Returns the frame's
        bytes. Raises FrameError when it does not fit."""
        shape = _shape(frame)
        if shape.end > self.nbytes:
            raise FrameError(f"a frame of {shape.end} bytes does not fit the slot of {self.nbytes} bytes")
        self._memory[:HEADER_BYTES] = _header(frame, shape)
        parts = self._parts(shape)
        if frame.num_tokens:
            for part, tensor in (
                (parts.hidden, frame.hidden),
                (parts.scales, frame.scales),
                (parts.expert_ids, frame.expert_ids),
                (parts.expert_weights, frame.expert_weights),
            ):
                if part is not None and tensor is not None:
                    part.copy_(tensor)
        if frame.message:
            self._memory[HEADER_BYTES : shape.end] = _message_bytes(frame)
        return shape.end

    def read(self, size: int) -> Frame:
        """The frame of `size` bytes; its tensors are views of the slot. Raises FrameError for anything malformed."""
        if size > self.nbytes:
            raise FrameError(f"a frame of {size} bytes does not fit the slot of {self.nbytes} bytes")
        header = bytes(self._memory[: min(size, HEADER_BYTES)])  # read once: the peer can write to it
        shape = _read_shape(header, size)
        return _frame(header, shape, self._parts(shape), self._memory[HEADER_BYTES:size])

    def _parts(self, shape: Shape) -> _Parts:
        parts = self._known.get(shape)
        if parts is None:
            if len(self._known) >= _KNOWN_SHAPES:
                self._known.clear()
            parts = self._known[shape] = _cut(self._bytes, shape)
        return parts


_KNOWN_SHAPES = 64  # of one slot


@dataclass(frozen=True, slots=True)
class _Parts:
    """A frame's tensors as views of its bytes; None where its shape has none."""

    hidden: Tensor | None
    scales: Tensor | None
    expert_ids: Tensor | None
    expert_weights: Tensor | None


def decode(buffer: Buffer, max_bytes: int) -> Frame:
    """The frame in `buffer`, which must be exactly one. Its tensors are views of the buffer, and keep it alive; nobody
    may write to them where it is read-only (torch has no read-only tensors). A frame that does not start at a multiple
    of 8 bytes is copied once. Raises FrameError for anything malformed, and for frames over `max_bytes`; raises nothing
    else whatever the bytes are."""
    view = memoryview(buffer).cast("B")
    if view.nbytes > max_bytes:
        raise FrameError(f"a frame of {view.nbytes} bytes is over the link's limit of {max_bytes} bytes")
    header = bytes(view[:HEADER_BYTES])
    shape = _read_shape(header, view.nbytes)
    return _frame(header, shape, _cut(_array(view), shape), view[HEADER_BYTES:])


def peek(header: bytes | memoryview) -> tuple[int, int]:
    """The kind and the microbatch that a header names, before the rest of its frame is here; they may be anything."""
    return header[_KIND_AT], int.from_bytes(header[_MICROBATCH_AT : _MICROBATCH_AT + 4], "little")


def _read_shape(header: bytes, size: int) -> Shape:
    if size < HEADER_BYTES:
        raise FrameError(f"a frame of {size} bytes is shorter than its header of {HEADER_BYTES} bytes")
    return read_shape(header[:SHAPE_BYTES], size)


def _frame(header: bytes, shape: Shape, parts: _Parts, payload: memoryview) -> Frame:
    attention_rank, ffn_rank, microbatch, layer, epoch, step, sequence = _IDENTITY.unpack_from(header, SHAPE_BYTES)
    message = _message(payload) if shape.message_bytes else ""
    return Frame(
        shape.kind, epoch, attention_rank, ffn_rank, microbatch, step, layer, sequence, shape.num_tokens,
        parts.hidden, parts.expert_ids, parts.expert_weights, message, parts.scales,
    )  # fmt: skip


def _cut(whole: NDArray[np.uint8] | Tensor, shape: Shape) -> _Parts:
    """The tensors of a frame whose bytes are `whole` (and maybe more). With numpy, where it can be, up to the last
    step: torch's own slices and views each lend the interpreter to other threads, and wait until they get it back."""

    def part(dtype: torch.dtype, start: int, columns: int) -> Tensor | None:
        if not columns:
            return None
        rows, known = shape.num_tokens, _NUMPY.get(dtype)
        end = start + rows * columns * dtype.itemsize
        if isinstance(whole, Tensor):
            return whole[start:end].view(dtype).view(rows, columns)
        array = whole[start:end].view(known or _SAME_SIZE[dtype.itemsize]).reshape(rows, columns)
        tensor = torch.from_numpy(array)
        return tensor if known else tensor.view(dtype)

    if shape.kind is FrameKind.ERROR:
        return _Parts(None, None, None, None)
    return _Parts(
        hidden=part(TORCH_DTYPES[shape.dtype], HEADER_BYTES, shape.hidden_size) if shape.dtype else None,
        scales=part(torch.float32, shape.scales, shape.groups),
        expert_ids=part(torch.int32, shape.ids, shape.top_k),
        expert_weights=part(torch.float32, shape.weights, shape.top_k),
    )


_NUMPY: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.int32: np.dtype("<i4")}
_SAME_SIZE: dict[int, np.dtype[Any]] = {2: np.dtype("<i2"), 1: np.dtype("u1")}  # for what numpy has no name for
_ALIGNMENT = 8


class _Writable:
    """Says of memory that it may be written to, whether or not it may: torch asks for no less."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}
        self._alive = array


def _array(view: memoryview) -> NDArray[np.uint8]:
    """The bytes of `view`, aligned; a view of them where they are."""
    array = np.frombuffer(view, np.uint8)
    if array.__array_interface__["data"][0] % _ALIGNMENT:
        return np.array(array)
    return np.asarray(_Writable(array), np.uint8) if view.readonly else array


def _header(frame: Frame, shape: Shape) -> bytes:
    assert shape.packed, f"a frame of {shape.end} bytes is over what any may have, {MAX_FRAME_BYTES} bytes"
    return shape.packed + _IDENTITY.pack(
        frame.attention_rank, frame.ffn_rank, frame.microbatch, frame.layer, frame.epoch, frame.step, frame.sequence
    )


def _shape(frame: Frame) -> Shape:
    """The frame's shape; asserts that it is one that `decode` accepts."""
    hidden, ids, weights, tokens, kind = (
        frame.hidden,
        frame.expert_ids,
        frame.expert_weights,
        frame.num_tokens,
        frame.kind,
    )
    assert (ids is None) == (weights is None), "expert_ids and expert_weights come together"
    assert hidden is not None or kind is not FrameKind.DISPATCH, "a dispatch has hidden"
    assert hidden is None or kind is not FrameKind.ERROR, "an error has no hidden"
    assert ids is None or kind is FrameKind.DISPATCH, "only a dispatch has routing"
    assert not frame.message or kind is FrameKind.ERROR, "only an error has a message"
    dtype, hidden_size, top_k = None, 0, 0
    if hidden is not None:
        dtype = _DTYPES.get(hidden.dtype)
        assert dtype is not None, f"hidden is {hidden.dtype}; frames carry {', '.join(map(str, _DTYPES))}"
        hidden_size = _columns("hidden", hidden, tokens)
    if dtype is DType.FP8:
        assert frame.scales is not None, "hidden is float8 and has no scales"
        assert frame.scales.dtype == torch.float32, f"scales are {frame.scales.dtype}, not float32"
        groups, wanted = _columns("scales", frame.scales, tokens), scale_groups(hidden_size)
        assert groups == wanted, f"a token has {groups} scales; hidden size {hidden_size} takes {wanted}"
    else:
        assert frame.scales is None, "only float8 has scales"
    if ids is not None and weights is not None:
        assert ids.dtype == torch.int32, f"expert_ids are {ids.dtype}, not int32"
        assert weights.dtype == torch.float32, f"expert_weights are {weights.dtype}, not float32"
        assert ids.shape == weights.shape, f"expert_ids are {list(ids.shape)}, expert_weights {list(weights.shape)}"
        top_k = _columns("expert_ids", ids, tokens)
    return shape_of(kind, dtype, tokens, hidden_size, top_k, len(_message_bytes(frame)) if frame.message else 0)


def _columns(name: str, tensor: Tensor, tokens: int) -> int:
    assert tensor.dim() == 2, f"{name} is {list(tensor.shape)}, not [tokens, n]"
    rows, columns = tensor.shape
    assert rows == tokens, f"{name} has {rows} rows, the frame {tokens} tokens"
    assert columns, f"{name} has no columns"
    return columns


def _message_bytes(frame: Frame) -> bytes:
    return frame.message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore").encode()


def _message(view: memoryview) -> str:
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise FrameError(f"an error frame's message is not UTF-8: {error}") from error


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes, where they are if they lie together on the CPU; valid as long as the tensor lives."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes:
        return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
    return tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().data
