"""Which role reads which part of which tensor. Pure: names and shapes in, names and index ranges out; no torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from afd.errors import CheckpointError
from afd.topology import FfnShard
from afd.types import DType, Role, TensorSpec
from afd.weights.headers import TensorInfo

Index = tuple[slice, ...]

# Left in a checkpoint by other tools although the model needs none of them: rotary tables that follow from the config,
# and an LM head that is a copy of the embedding it is tied to.
IGNORABLE = (re.compile(r"(^|\.)rotary_emb\.inv_freq$"), re.compile(r"^lm_head\.weight$"))
_SHOWN = 3


def check(specs: Sequence[TensorSpec], infos: Mapping[str, TensorInfo], source: str) -> None:
    """Raises CheckpointError unless the checkpoint `source` holds exactly the tensors of `specs`, in their shapes.

    Optional tensors may be missing, IGNORABLE ones left over. The message lists the first few of each kind of fault.
    """
    wanted = {spec.name: spec for spec in specs}
    missing = [s.name for s in specs if s.name not in infos and not s.optional]
    left_over = [n for n in infos if n not in wanted and not any(p.search(n) for p in IGNORABLE)]
    misshapen = [
        f"{n} is {list(infos[n].shape)} and should be {list(s.shape)}"
        for n, s in wanted.items()
        if n in infos and infos[n].shape != s.shape
    ]
    faults = [
        f"{len(items)} {what}: {'; '.join(items[:_SHOWN])}{'; ...' if len(items) > _SHOWN else ''}"
        for what, items in (
            ("tensors missing", missing),
            ("tensors left over that no part of the model owns", left_over),
            ("tensors of the wrong shape", misshapen),
        )
        if items
    ]
    if faults:
        raise CheckpointError(f"{source} does not fit its config.json: " + " | ".join(faults))


def owned(specs: Sequence[TensorSpec], role: Role, shard: FfnShard | None) -> list[tuple[TensorSpec, Index]]:
    """The tensors `role` reads, each with the index of its part; `shard` says which FFN rank, None for attention.

    Optional tensors are read by nobody: what may be missing is a copy of something else.
    """
    assert (shard is None) == (role is Role.ATTENTION), f"role {role.value} with shard {shard}"
    specs = [s for s in specs if not s.optional]
    if shard is None:
        return [(s, tuple(slice(0, n) for n in s.shape)) for s in specs if s.role is role]
    first, end = shard.bounds(num_experts(specs), "ep")
    return [
        (s, shard.slices(s.shape, s.cuts))
        for s in specs
        if s.role is role and (s.expert is None or first <= s.expert < end)
    ]


def num_experts(specs: Iterable[TensorSpec]) -> int:
    """Experts that have tensors of their own in `specs`; 0 when they are stacked or there are none."""
    return max((s.expert + 1 for s in specs if s.expert is not None), default=0)


def role_bytes(specs: Sequence[TensorSpec], role: Role, shard: FfnShard | None, dtype: DType) -> int:
    """Bytes of weights that a worker of `role` holds in `dtype`."""
    return sum(elements(index) for _, index in owned(specs, role, shard)) * dtype.itemsize


def cover_faults(specs: Sequence[TensorSpec], shards: Sequence[FfnShard]) -> list[str]:
    """One sentence per tensor that an attention worker and the FFN workers `shards` do not read exactly once together.

    Empty means proven: the parts of every tensor are disjoint boxes whose volumes add up to the whole. Optional
    tensors are left aside.
    """
    specs = [s for s in specs if not s.optional]
    parts: dict[str, list[Index]] = {spec.name: [] for spec in specs}
    for role, shard in [(Role.ATTENTION, None), *((Role.FFN, shard) for shard in shards)]:
        for spec, index in owned(specs, role, shard):
            if elements(index):
                parts[spec.name].append(index)
    faults = []
    for spec in specs:
        covered, whole = sum(map(elements, parts[spec.name])), math.prod(spec.shape)
        if any(_overlap(a, b) for a, b in itertools.combinations(parts[spec.name], 2)):
            faults.append(f"{spec.name} is read more than once")
        elif covered != whole:
            faults.append(f"{spec.name}: {covered} of {whole} elements are read")
    return faults


def elements(index: Index) -> int:
    """How many numbers the part at `index` has."""
    return math.prod(part.stop - part.start for part in index)


def _overlap(a: Index, b: Index) -> bool:
    return all(p.start < q.stop and q.start < p.stop for p, q in zip(a, b, strict=True))
