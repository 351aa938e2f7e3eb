"""Every error this project raises, as one tree. A message names the thing, the value, the limit and the knob.

AfdError
├── ConfigError            the user's file, flag or environment variable is wrong
├── ModelError             the model cannot be served
│   ├── UnsupportedModel   its config.json asks for what no family here implements
│   └── CheckpointError    its files are missing, damaged, incomplete or hold too much
├── TransportError         activations did not get through
│   ├── HandshakeRefused   the two sides do not agree on what they serve
│   │   └── Unauthenticated  or on who they are: a token or a certificate is not this cluster's
│   ├── FrameError         a frame is damaged, or belongs to somebody else
│   ├── PeerLost           the other side is gone
│   └── PeerTimeout        the other side did not answer before the deadline
├── RequestError           the client asked for what cannot be (HTTP 4xx)
├── Unavailable            no worker can take the request now (HTTP 503)
│   └── QueueFull          too many requests wait already (HTTP 429)
├── DeadlineExceeded       the request's time ran out (HTTP 504)
└── ClusterError           workers cannot be started, reached or stopped
"""

from __future__ import annotations


class AfdError(Exception):
    """Root of the tree. Its text is one sentence for the person who can mend it."""


class ConfigError(AfdError):
    """The user's file, flag or environment variable is wrong."""


class ModelError(AfdError):
    """The model cannot be served."""


class UnsupportedModel(ModelError):
    """config.json asks for something no family here implements."""


class CheckpointError(ModelError):
    """Checkpoint files are missing, damaged, incomplete, or hold tensors nobody owns."""


class TransportError(AfdError):
    """Activations did not get through. `peer` names the other side, for example 'ffn_rank 1'."""

    def __init__(self, message: str, *, peer: str = "") -> None:
        super().__init__(message)
        self.peer = peer


class HandshakeRefused(TransportError):
    """The two sides do not agree on protocol, model, shard, dtype or sizes."""


class Unauthenticated(HandshakeRefused):
    """A token or a certificate is not this cluster's."""


class FrameError(TransportError):
    """A frame is damaged, or carries an identity that is not its link's."""


class PeerLost(TransportError):
    """The other side closed or died."""


class PeerTimeout(TransportError):
    """The other side did not answer before the deadline."""


class RequestError(AfdError):
    """The client asked for something that cannot be. `param` is the field at fault, `status` the HTTP status."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class Unavailable(AfdError):
    """No worker can take the request now; the same request may pass later."""


class QueueFull(Unavailable):
    """Too many requests wait already; the same request may pass in `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(AfdError):
    """The request's time ran out before its answer was complete."""


class ClusterError(AfdError):
    """Workers cannot be started, reached or stopped."""
