from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromAttention(_message.Message):
    __slots__ = ("frame", "hello", "pad")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PAD_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    hello: Hello
    pad: bytes
    def __init__(self, frame: _Optional[bytes] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., pad: _Optional[bytes] = ...) -> None: ...

class FromFfn(_message.Message):
    __slots__ = ("frame", "welcome", "pad")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PAD_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    welcome: Welcome
    pad: bytes
    def __init__(self, frame: _Optional[bytes] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., pad: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "epoch", "model_digest", "attention_rank", "ffn_rank", "ep", "tp", "dtype", "num_layers", "hidden_size", "num_experts", "top_k", "max_tokens", "microbatches", "dispatch_dtype")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_RANK_FIELD_NUMBER: _ClassVar[int]
    FFN_RANK_FIELD_NUMBER: _ClassVar[int]
    EP_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_DTYPE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    epoch: int
    model_digest: str
    attention_rank: int
    ffn_rank: int
    ep: int
    tp: int
    dtype: int
    num_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    max_tokens: int
    microbatches: int
    dispatch_dtype: int
    def __init__(self, protocol_version: _Optional[int] = ..., epoch: _Optional[int] = ..., model_digest: _Optional[str] = ..., attention_rank: _Optional[int] = ..., ffn_rank: _Optional[int] = ..., ep: _Optional[int] = ..., tp: _Optional[int] = ..., dtype: _Optional[int] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., max_tokens: _Optional[int] = ..., microbatches: _Optional[int] = ..., dispatch_dtype: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("refusal",)
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    def __init__(self, refusal: _Optional[str] = ...) -> None: ...
