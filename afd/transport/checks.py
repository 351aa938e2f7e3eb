"""Is this frame whose it says it is, and of the shape the handshake agreed on? Both sides ask before they use one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from afd.errors import FrameError
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport.base import Hello
from afd.transport.frame import Frame, FrameKind
from afd.types import DType


class Sent(NamedTuple):
    """What a microbatch waits for on one link: the identity of its dispatch, and when it was sent (monotonic, s)."""

    step: int
    layer: int
    sequence: int
    num_tokens: int
    at_s: float


def check_limits(frame: Frame, hello: Hello) -> None:
    """Raises FrameError unless `frame` is a dispatch of this link within the limits its handshake agreed on."""
    if frame.kind is not FrameKind.DISPATCH:
        raise FrameError(f"a {frame.kind.name.lower()} frame came where only dispatches may")
    _check_link(frame, hello)
    _check_below("microbatch", frame.microbatch, hello.microbatches, "attention.microbatches")
    _check_below("layer", frame.layer, hello.num_layers, "the model's layers")
    if frame.num_tokens > hello.max_tokens:
        raise FrameError(
            f"a frame of {frame.num_tokens} tokens is over the limit of {hello.max_tokens} (attention.max_batch_tokens)"
        )
    assert frame.hidden is not None, "a dispatch without hidden does not decode"
    _check_hidden(frame.hidden, hello, hello.dispatch_dtype)
    if frame.expert_ids is not None and frame.expert_ids.shape[1] != hello.top_k:
        raise FrameError(f"a dispatch has top_k {frame.expert_ids.shape[1]}; the model has {hello.top_k}")


def check_dispatch(frame: Frame, hello: Hello) -> None:
    """`check_limits`, and every expert id in range."""
    check_limits(frame, hello)
    ids = frame.expert_ids
    if ids is not None and ids.numel():
        array = ids.numpy()  # torch's own minimum lends the interpreter to other threads
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= hello.num_experts:
            raise FrameError(
                f"a dispatch has expert ids {low} to {high}; the model has experts 0 to {hello.num_experts - 1}"
            )


def check_answer(frame: Frame, hello: Hello, sent: Sent | None) -> None:
    """Raises FrameError unless `frame` answers exactly the dispatch `sent` (the one its microbatch waits for)."""
    if frame.kind is FrameKind.DISPATCH:
        raise FrameError("a dispatch frame came where only combines and errors may")
    _check_link(frame, hello)
    if sent is None:
        raise FrameError(
            f"microbatch {frame.microbatch}, step {frame.step}, layer {frame.layer} was answered but waits for nothing"
        )
    if (frame.step, frame.layer, frame.sequence, frame.num_tokens) != sent[:4]:
        for name in ("step", "layer", "sequence", "num_tokens"):
            got, asked = getattr(frame, name), getattr(sent, name)
            if got != asked:
                raise FrameError(
                    f"microbatch {frame.microbatch} waits for {name} {asked} and was answered with {name} {got}"
                )
    if frame.hidden is not None:
        _check_hidden(frame.hidden, hello, hello.dtype)


def _check_link(frame: Frame, hello: Hello) -> None:
    if frame.epoch == hello.epoch and frame.attention_rank == hello.attention_rank and frame.ffn_rank == hello.ffn_rank:
        return
    for name in ("epoch", "attention_rank", "ffn_rank"):
        got, agreed = getattr(frame, name), getattr(hello, name)
        if got != agreed:
            raise FrameError(f"a frame with {name} {got} came on the link of {name} {agreed}")


def _check_below(name: str, value: int, limit: int, knob: str) -> None:
    if not 0 <= value < limit:
        raise FrameError(f"a frame has {name} {value}; the limit is {limit - 1} ({knob})")


def _check_hidden(hidden: Tensor, hello: Hello, agreed: DType) -> None:
    dtype = TORCH_DTYPES[agreed]
    if hidden.dtype != dtype or hidden.shape[1] != hello.hidden_size:
        raise FrameError(
            f"a frame has hidden of {hidden.dtype} and size {hidden.shape[1]}; "
            f"the link carries {dtype} of size {hello.hidden_size}"
        )
