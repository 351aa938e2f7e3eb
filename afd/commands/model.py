"""`afd model`: prepares named models, lists them, and shows what of a model lands on which worker."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from afd import build
from afd.cluster import launch
from afd.config import Deployment
from afd.topology import FfnShard
from afd.types import Role
from afd.weights import library, ownership


@dataclass(frozen=True)
class Part:
    """What one worker holds of a model. `role` and `rank` as in WorkerView; nbytes in the served dtype."""

    role: str
    rank: int
    shard: str
    tensors: int
    parameters: int
    nbytes: int


def prepare(name: str, force: bool) -> None:
    """Prepares `name` with a progress bar; one that is prepared is read against its checksums instead, unless `force`.
    Raises ModelError."""
    console = Console(stderr=True)
    if not force and any(model.name == name and model.prepared for model in library.known()):
        launch.with_progress("checking", name, console, partial(library.verify, name))
        print(f"{name} is prepared in {library.folder(name)}; every file has its checksum")
        return
    launch.prepare(name, console, force)
    print(f"{name} is prepared in {library.folder(name)}")


def list_known() -> None:
    """Prints the named models."""
    table = Table("model", "prepared", "size", "what it is")
    for model in library.known():
        size = decimal(model.nbytes) if model.prepared else ""
        table.add_row(model.name, "yes" if model.prepared else "no", size, model.description)
    Console().print(table)


def info(deployment: Deployment, as_json: bool) -> None:
    """Prints what each worker of the deployment holds. Raises ModelError, ConfigError."""
    plan = build.plan(deployment)
    parts = [_part(plan, rank, None) for rank in range(deployment.counts.attention)]
    parts += [_part(plan, shard.ffn_rank, shard) for shard in plan.shards]
    kv_bytes = plan.spec.kv_bytes_per_token(plan.dtype)
    if as_json:
        facts = {
            "model": plan.files.name,
            "family": plan.spec.family,
            "topology": deployment.topology,
            "dtype": plan.dtype.name.lower(),
            "layers": plan.spec.layers,
            "moe_layers": len(plan.spec.moe.layers) if plan.spec.moe else 0,
            "max_context": plan.spec.max_context,
            "kv_bytes_per_token": kv_bytes,
            "workers": [asdict(part) for part in parts],
        }
        json.dump(facts, sys.stdout, indent=2)
        print()
        return
    experts = f", {plan.spec.moe.experts} experts on {len(plan.spec.moe.layers)} of them" if plan.spec.moe else ""
    console = Console(highlight=False)
    console.print(f"{plan.files.name} ({plan.spec.family}): {plan.spec.layers} layers{experts}")
    console.print(f"{deployment.topology} in {plan.dtype.name.lower()}; {kv_bytes} bytes of KV cache per token")
    table = Table("worker", "shard", "tensors", "parameters", "bytes")
    for part in parts:
        name = f"{part.role}_rank {part.rank}"
        table.add_row(name, part.shard, str(part.tensors), f"{part.parameters:,}", decimal(part.nbytes))
    console.print(table)


def _part(plan: build.Plan, rank: int, shard: FfnShard | None) -> Part:
    """`shard` None: an attention worker, all of which hold the same."""
    role = Role.FFN if shard else Role.ATTENTION
    owned = [
        (spec, index)
        for spec, index in ownership.owned(plan.family.tensors(plan.spec), role, shard)
        if not spec.optional and ownership.elements(index)
    ]
    where = f"ep {shard.ep_rank} of {shard.ep}, tp {shard.tp_rank} of {shard.tp}" if shard else ""
    parameters = sum(ownership.elements(index) for _, index in owned)
    return Part(role.value, rank, where, len(owned), parameters, parameters * plan.dtype.itemsize)
