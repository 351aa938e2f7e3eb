"""Names for full blocks of token ids: equal names mean equal tokens, and equal tokens before them. No torch.

A name is a 128-bit BLAKE2b digest of the name of the block before and the block's own ids, so nobody can make two
different prompts share one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_NAME_BYTES = 16
_ID_BYTES = 4  # token ids are below 2**32


def extend_names(names: list[bytes], token_ids: Sequence[int], block_size: int, salt: str = "") -> None:
    """Appends the names of those full blocks of `token_ids` that `names`, which holds the names of the first ones, does
    not have yet. Different salts give different names."""
    first, end = len(names), len(token_ids) // block_size
    if first >= end:
        return
    parent = names[-1] if names else blake2b(salt.encode(), digest_size=_NAME_BYTES).digest()
    packed = array("I", token_ids[first * block_size : end * block_size]).tobytes()
    step = _ID_BYTES * block_size
    for start in range(0, len(packed), step):
        parent = blake2b(parent + packed[start : start + step], digest_size=_NAME_BYTES).digest()
        names.append(parent)
