"""The frame's bytes: what is written is read again, and nothing else is ever read."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.errors import FrameError
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport.frame import Frame, FrameKind, Slot, decode, encode
from afd.transport.shape import HEADER_BYTES, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, frame_bytes
from afd.types import DType

LIMIT = 1 << 20
PLAIN = Frame(FrameKind.DISPATCH, 1, 2, 3, 4, 5, 6, 7, 2, torch.arange(6.0).view(2, 3))


def packed(frame: Frame) -> bytearray:
    return bytearray().join(encode(frame))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    kind = draw(st.sampled_from(FrameKind))
    u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
    count = draw(st.integers(0, 9))
    frame = Frame(
        kind, draw(u64), draw(u32), draw(u32), draw(u32), draw(u64), draw(u32), draw(u64), count,
        message=draw(st.text(max_size=50)) if kind is FrameKind.ERROR else "",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if kind is FrameKind.DISPATCH or (kind is FrameKind.COMBINE and draw(st.booleans())):
        hidden = torch.randn(count, draw(st.integers(1, 17)), generator=generator)
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]))
        scales = torch.rand(count, 1, generator=generator) if dtype is torch.float8_e4m3fn else None
        frame = replace(frame, hidden=hidden.to(dtype), scales=scales)
    if kind is FrameKind.DISPATCH and draw(st.booleans()):
        shape = (count, draw(st.integers(1, 5)))
        ids = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)
        frame = replace(frame, expert_ids=ids, expert_weights=torch.rand(shape, generator=generator))
    return frame


def assert_same(left: Frame, right: Frame) -> None:
    for name in Frame.__slots__:  # type: ignore[attr-defined]
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, torch.Tensor):
            assert isinstance(b, torch.Tensor)
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        else:
            assert a == b, name


@settings(deadline=None)
@given(frames())
def test_every_frame_reads_back_as_it_was_written(frame: Frame) -> None:
    data = packed(frame)
    assert_same(frame, decode(data, LIMIT))
    assert_same(frame, decode(bytes(data), LIMIT))
    memory = bytearray(len(data) + 9)
    slot = Slot(memoryview(memory))
    size = slot.write(frame)
    assert size == len(data) == frame.wire_bytes
    assert_same(frame, slot.read(size))
    assert_same(frame, decode(memoryview(memory)[:size], LIMIT))
    if frame.kind is not FrameKind.ERROR and frame.hidden is not None:
        dtype = next(d for d, t in TORCH_DTYPES.items() if t is frame.hidden.dtype)
        top_k = 0 if frame.expert_ids is None else frame.expert_ids.shape[1]
        assert size == frame_bytes(frame.num_tokens, frame.hidden.shape[1], dtype, top_k)


@settings(deadline=None)
@given(st.lists(frames(), min_size=2, max_size=6))
def test_a_slot_gives_each_frame_as_a_fresh_buffer_would(several: list[Frame]) -> None:
    memory = memoryview(bytearray(4096))
    writer, reader = Slot(memory), Slot(memory)
    for frame in several + several:
        size = writer.write(frame)
        assert_same(reader.read(size), decode(bytes(memory[:size]), LIMIT))


def test_a_slot_forgets_sizes_before_they_are_many() -> None:
    slot = Slot(memoryview(bytearray(1 << 16)))
    for tokens in range(300):
        frame = replace(PLAIN, num_tokens=tokens, hidden=torch.full((tokens, 3), float(tokens)))
        assert_same(frame, slot.read(slot.write(frame)))
    assert len(slot._known) <= 64


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_frame_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode(data, LIMIT)


@settings(deadline=None, max_examples=500)
@given(frames(), st.data())
def test_a_frame_with_flipped_bytes_decodes_or_is_a_frame_error(frame: Frame, data: st.DataObject) -> None:
    damaged = packed(frame)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, min(len(damaged), HEADER_BYTES + 8) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(damaged, LIMIT)
    except FrameError:
        return
    packed(decoded)  # what is accepted is well formed


@settings(deadline=None)
@given(frames(), st.data())
def test_a_frame_cut_short_or_made_longer_is_a_frame_error(frame: Frame, data: st.DataObject) -> None:
    whole = packed(frame)
    with pytest.raises(FrameError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))], LIMIT)
    with pytest.raises(FrameError):
        decode(whole + b"\0", LIMIT)


@pytest.mark.parametrize(
    ("offset", "code", "value", "said"),
    [
        (0, "4s", b"HTTP", "starts with b'HTTP' instead of b'AFD\\x00'"),
        (4, "H", 9, f"protocol version 9; this side speaks {PROTOCOL_VERSION}"),
        (6, "B", 7, "kind 7; known are 1 (dispatch), 2 (combine), 3 (error)"),
        (7, "B", 4, "dtype 4; known are 1 (FP32), 2 (BF16), 3 (FP8)"),
        (7, "B", 0, "dtype 0 and hidden size 3; both or neither are 0"),
        (7, "B", 2, "2 tokens of hidden size 3, dtype 2 and top_k 0 take 76 bytes; the frame has 88"),
        (8, "H", 1, "flags 0x1"),
        (10, "H", 1, "top_k 1 take 104 bytes; the frame has 88"),
        (12, "I", 3, "3 tokens of hidden size 3"),
        (16, "I", 2**32 - 1, "hidden size 4294967295"),
        (16, "I", 0, "dtype 1 and hidden size 0"),
        (20, "I", 25, "claims 25 bytes of payload and carries 24"),
        (6, "B", 3, "an error frame has a hidden tensor"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(offset: int, code: str, value: object, said: str) -> None:
    data = packed(PLAIN)
    struct.pack_into(f"<{code}", data, offset, value)
    with pytest.raises(FrameError) as caught:
        decode(data, LIMIT)
    assert said in str(caught.value)


def test_the_header_is_where_the_table_says() -> None:
    routed = replace(PLAIN, expert_ids=torch.ones(2, 4, dtype=torch.int32), expert_weights=torch.ones(2, 4))
    data = packed(replace(routed, hidden=PLAIN.hidden.bfloat16()))  # type: ignore[union-attr]
    assert data[:4] == b"AFD\0"
    assert struct.unpack_from("<HBBHHIIIIIIIQQQ", data, 4) == (
        PROTOCOL_VERSION,
        1,
        2,
        0,
        4,
        2,
        3,
        76,
        2,
        3,
        4,
        6,
        1,
        5,
        7,
    )
    assert len(data) == HEADER_BYTES + 12 + 32 + 32


def test_scales_lie_between_hidden_and_routing() -> None:
    frame = replace(
        PLAIN,
        hidden=torch.ones(2, 129).to(torch.float8_e4m3fn),
        scales=torch.tensor([[0.5, 2.0], [1.0, 4.0]]),
        expert_ids=torch.tensor([[5], [6]], dtype=torch.int32),
        expert_weights=torch.tensor([[0.5], [0.25]]),
    )
    data = packed(frame)
    assert len(data) == HEADER_BYTES + 258 + 2 + 2 * 2 * 4 + 8 + 8 == frame_bytes(2, 129, DType.FP8, 1)
    assert struct.unpack_from("<4f2i2f", data, HEADER_BYTES + 260) == (0.5, 2.0, 1.0, 4.0, 5, 6, 0.5, 0.25)
    assert_same(decode(data, LIMIT), frame)


def test_hidden_is_padded_so_that_routing_stays_aligned() -> None:
    odd = replace(
        PLAIN,
        num_tokens=1,
        hidden=torch.ones(1, 3, dtype=torch.bfloat16),
        expert_ids=torch.tensor([[5]], dtype=torch.int32),
        expert_weights=torch.tensor([[0.5]]),
    )
    data = packed(odd)
    assert len(data) == HEADER_BYTES + 6 + 2 + 4 + 4
    assert_same(decode(data, LIMIT), odd)


def test_tensors_are_views_of_a_writable_buffer_and_copies_of_another() -> None:
    data = packed(PLAIN)
    view, copy = decode(data, LIMIT).hidden, decode(bytes(data), LIMIT).hidden
    assert view is not None
    assert copy is not None
    data[HEADER_BYTES:] = bytes(len(data) - HEADER_BYTES)
    assert not view.any()
    assert copy.any()


def test_a_frame_over_the_limit_is_refused_with_both_sizes() -> None:
    with pytest.raises(FrameError, match="a frame of 88 bytes is over the link's limit of 87 bytes"):
        decode(packed(PLAIN), 87)
    with pytest.raises(FrameError, match="a frame of 88 bytes does not fit the slot of 87 bytes"):
        Slot(memoryview(bytearray(87))).write(PLAIN)
    with pytest.raises(FrameError, match="a frame of 88 bytes does not fit the slot of 87 bytes"):
        Slot(memoryview(bytearray(87))).read(88)


def test_an_errors_sentence_is_cut_between_characters_and_must_be_utf_8() -> None:
    error = replace(PLAIN, kind=FrameKind.ERROR, hidden=None, message="ü" * MAX_MESSAGE_BYTES)
    data = packed(error)
    assert decode(data, LIMIT).message == "ü" * (MAX_MESSAGE_BYTES // 2)
    data[-1] = 0xFF
    with pytest.raises(FrameError, match="is not UTF-8"):
        decode(data, LIMIT)
    long = packed(replace(error, message="x" * MAX_MESSAGE_BYTES)) + b"x"
    struct.pack_into("<I", long, 20, MAX_MESSAGE_BYTES + 1)
    with pytest.raises(FrameError, match=f"{MAX_MESSAGE_BYTES + 1} bytes; the limit is {MAX_MESSAGE_BYTES}"):
        decode(long, LIMIT)
    assert decode(packed(replace(error, message="lone \ud800")), LIMIT).message == "lone ?"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": None},
        {"hidden": torch.zeros(3, 3)},
        {"hidden": torch.zeros(2)},
        {"hidden": torch.zeros(2, 3, dtype=torch.float16)},
        {"expert_ids": torch.zeros(2, 1, dtype=torch.int32)},
        {"expert_ids": torch.zeros(2, 1, dtype=torch.int64), "expert_weights": torch.zeros(2, 1)},
        {"expert_ids": torch.zeros(2, 1, dtype=torch.int32), "expert_weights": torch.zeros(2, 2)},
        {"hidden": torch.zeros(2, 3).to(torch.float8_e4m3fn)},
        {"hidden": torch.zeros(2, 3).to(torch.float8_e4m3fn), "scales": torch.zeros(2, 2)},
        {"hidden": torch.zeros(2, 3).to(torch.float8_e4m3fn), "scales": torch.zeros(1, 1)},
        {"hidden": torch.zeros(2, 3).to(torch.float8_e4m3fn), "scales": torch.zeros(2, 1).double()},
        {"scales": torch.zeros(2, 1)},
        {"message": "no"},
        {"kind": FrameKind.ERROR},
    ],
)
def test_our_own_malformed_frames_are_bugs(changes: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        encode(replace(PLAIN, **changes))  # type: ignore[arg-type]
