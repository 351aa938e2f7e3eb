"""Types of request fields that several requests share, or that JSON writes in another way."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import orjson
from pydantic import BeforeValidator, Field

MAX_BIASES = 1024
MAX_STOP_IDS = 1024
MAX_ALLOWED_IDS = 1 << 18  # more than vocabularies have
MAX_VALUES = 1 << 22  # in one body; what reading it costs in memory and time goes with their number
MAX_DEPTH = 128  # of lists and objects in one another; far below where recursion over them ends

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Of lists without end, the first fault is enough.
StopIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_IDS)]
AllowedIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_ALLOWED_IDS)]


def read_json(text: str | bytes) -> object:
    """What JSON says. Raises ValueError for what is none, is nested deeper than MAX_DEPTH, or has more than MAX_VALUES
    values, counted by commas and brackets, those in strings included."""
    raw = text.encode() if isinstance(text, str) else text
    num_values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if num_values > MAX_VALUES:
        raise ValueError(f"it has {num_values} commas and opening brackets, and may have {MAX_VALUES}")
    value = orjson.loads(raw)
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
    return value


def shown(value: object, depth: int = 3) -> str:
    """The beginning of a value for an error's sentence: short, and quickly made of a value of any size."""
    text = repr(_beginning(value, depth))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _beginning(value: object, depth: int) -> object:
    if isinstance(value, str):
        return value[:80]
    if isinstance(value, list) and depth:
        return [_beginning(item, depth - 1) for item in value[:20]]
    if isinstance(value, dict) and depth:
        return {str(key)[:80]: _beginning(item, depth - 1) for key, item in islice(value.items(), 20)}
    return [] if isinstance(value, list) else {} if isinstance(value, dict) else value


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
