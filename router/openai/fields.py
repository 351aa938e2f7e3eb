"""Types of request fields that several requests share, or that JSON writes in another way."""

from __future__ import annotations

from typing import Annotated

import orjson
from pydantic import BeforeValidator, Field

MAX_BIASES = 1024
MAX_DEPTH = 128  # of lists and objects in one another; far below where recursion over them ends

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def read_json(text: str | bytes) -> object:
    """What JSON says. Raises ValueError for what is none, or is nested deeper than MAX_DEPTH."""
    value = orjson.loads(text)
    raw = text.encode() if isinstance(text, str) else text
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [inner for part in parts for inner in part]
        if not level:
            return False
    return any(isinstance(part, dict | list) for part in level)


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
