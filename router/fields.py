"""Types of request fields that several requests share, or that JSON writes in another way."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

MAX_BIASES = 1024

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _biases(value: object) -> object:
    """JSON's keys are strings; ours are the token ids that they spell."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise ValueError(f"must hold at most {MAX_BIASES} entries, and has {len(value)}")
    wrong = next((key for key in value if not (key.isascii() and key.isdigit() and len(key) <= 10)), None)
    if wrong is not None:
        raise ValueError(f"must map token ids to numbers, and has the key {wrong[:40]!r}")
    return {int(key): bias for key, bias in value.items()}


LogitBias = Annotated[dict[TokenId, Bias] | None, BeforeValidator(_biases)]
