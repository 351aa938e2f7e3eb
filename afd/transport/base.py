"""Activations between one attention worker and one FFN worker: the interface every transport implements.

A transport offers two things, symmetric from there on:

    listen(...) -> Listener      FFN side; `try_accept` gives a Link for each attention worker that shook hands
    dial(...)   -> Link          attention side

A Link carries whole frames both ways, in order, and has a file descriptor that becomes readable when a frame or the
peer's end may be there; some can call a function instead, which is sooner. What waits on many links at once (spin, then
sleep) and what checks identities is written once, above the links: afd.transport.ports.

Threads: a Link, Listener or port belongs to the one thread that uses it; only `wake` and `close` may be called from
another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from afd.transport.frame import Frame
from afd.transport.shape import HEADER_BYTES, MAX_MESSAGE_BYTES, frame_bytes
from afd.types import DType


@dataclass(frozen=True, slots=True)
class Hello:
    """What the attention side believes at connect; the FFN side compares it with its own (proto/afd/rpc/ffn.proto)."""

    epoch: int
    model_digest: str
    attention_rank: int
    ffn_rank: int
    ep: int
    tp: int
    dtype: DType  # the model's, and a combine's
    dispatch_dtype: DType  # a dispatch's: the model's, or one of fewer bytes
    num_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    max_tokens: int
    microbatches: int

    @property
    def dispatch_bytes(self) -> int:
        """Bytes of the largest frame from the attention side."""
        return frame_bytes(self.max_tokens, self.hidden_size, self.dispatch_dtype, self.top_k)

    @property
    def combine_bytes(self) -> int:
        """Bytes of the largest frame from the FFN side: a combine or an error."""
        return max(frame_bytes(self.max_tokens, self.hidden_size, self.dtype, 0), HEADER_BYTES + MAX_MESSAGE_BYTES)


class Link(ABC):
    """One connected pair of workers, after the handshake.

    Buffers: a received frame's tensors may be views of the link's own memory. On the attention side they are valid
    until the next dispatch of the same microbatch on this link; on the FFN side until the combine that answers it is
    sent. `send` has copied or sent everything when it returns: the caller may reuse its tensors at once.
    """

    peer: str  # for messages, e.g. "ffn_rank 1"
    hello: Hello
    spins: bool = False  # whether `poll`, called over and over, sees a frame sooner than sleeping would

    @abstractmethod
    def send(self, frame: Frame) -> None:
        """Sends a whole frame. Blocks at most the transport's deadline. Raises PeerLost, PeerTimeout."""

    @abstractmethod
    def try_receive(self) -> Frame | None:
        """The next frame if one is here; never blocks. Raises PeerLost once the peer is gone and all its frames
        were read, FrameError if what came is not a frame."""

    def poll(self) -> Frame | None:
        """`try_receive`, as cheap as can be: it may overlook that the peer is gone, and the descriptor need not become
        readable after it."""
        return self.try_receive()

    @abstractmethod
    def fileno(self) -> int:
        """After `try_receive` gave None: readable once it may give a frame or raise."""

    def announce(self, ring: Callable[[], None]) -> bool:  # noqa: ARG002 - of those that can
        """From now on calls `ring`, in any thread, whenever `try_receive` may give a frame or raise; the link has no
        descriptor any more. A link that has only its descriptor changes nothing and says False."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Ends the link; the peer sees PeerLost. Idempotent."""


class Listener(ABC):
    """The FFN side's door. `address` is what `dial` takes."""

    address: str

    @abstractmethod
    def try_accept(self) -> Link | None:
        """The next attention worker whose handshake was welcomed, if one is here; never blocks for long. Refused
        ones get their sentence and are logged, not returned."""

    @abstractmethod
    def fileno(self) -> int:
        """Readable whenever `try_accept` may give a link."""

    @abstractmethod
    def close(self) -> None:
        """Closes the door (not the links it accepted) and leaves no file behind. Idempotent."""
