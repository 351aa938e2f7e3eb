"""Where models, weights and transports meet: what a deployment means for one worker, resolved once.

Used by both roles' actors, which add what is theirs (a KV cache and an engine, or a loop).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from ctypes import CDLL
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afd import spec as specs
from afd.config import Deployment
from afd.errors import CheckpointError
from afd.models import registry
from afd.native.halves import attention_fits, kernels_for
from afd.spec import ModelSpec
from afd.topology import FfnShard, ffn_shards
from afd.torch_dtypes import TORCH_DTYPES
from afd.transport.base import Hello
from afd.types import DType, Role
from afd.weights import library
from afd.weights.checkpoint import open_checkpoint
from afd.weights.load import load, resolve_device, resolve_dtype


@dataclass(frozen=True)
class Plan:
    """A deployment with its model looked up: sizes, family, dtype, device and every FFN rank's shard."""

    deployment: Deployment
    files: library.ModelFiles
    spec: ModelSpec
    family: registry.Family
    dtype: DType
    device: torch.device
    shards: tuple[FfnShard, ...]
    model_digest: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def dispatch_dtype(self) -> DType:
        """What dispatches travel in (transport.dispatch_dtype)."""
        wanted = self.deployment.transport.dispatch_dtype
        return self.dtype if wanted == "auto" else DType[wanted.upper()]

    def weights(self, role: Role, shard: FfnShard | None = None) -> Mapping[str, Tensor]:
        """Reads one role's tensors, and of them only `shard`'s part; each can be taken once. Raises CheckpointError."""
        with open_checkpoint(self.files.path) as checkpoint:
            return _Handover(load(checkpoint, self.family.tensors(self.spec), role, shard, self.dtype, self.device))

    def hello(self, epoch: int, attention_rank: int, ffn_rank: int) -> Hello:
        """What both sides of a link must agree on."""
        return Hello(
            epoch=epoch,
            model_digest=self.model_digest,
            attention_rank=attention_rank,
            ffn_rank=ffn_rank,
            ep=self.shards[0].ep,
            tp=self.shards[0].tp,
            dtype=self.dtype,
            dispatch_dtype=self.dispatch_dtype,
            num_layers=self.spec.layers,
            hidden_size=self.spec.hidden,
            num_experts=self.spec.num_experts,
            top_k=self.spec.top_k,
            max_tokens=self.deployment.attention.max_batch_tokens,
            microbatches=self.deployment.attention.most_microbatches,
        )


def attention_kernels(plan: Plan, block_size: int) -> CDLL | None:
    """The compiled kernels, where an attention worker can compute with them; None: plain torch does."""
    spec = plan.spec
    kernels = kernels_for(plan.device, plan.torch_dtype, spec.hidden)
    fits = kernels and attention_fits(kernels, spec.attention.head_dim, block_size, spec.attention.q_rank)
    return kernels if fits else None


class _Handover(dict[str, Tensor]):
    """Weights on their way into a half, which packs them: taking one lets go of it, so that memory holds every weight
    once, and not twice."""

    def __getitem__(self, name: str) -> Tensor:
        return self.pop(name)


def plan(deployment: Deployment) -> Plan:
    """Raises ModelError for a model that cannot be served, ConfigError for a topology that does not fit it."""
    files = library.resolve(deployment.model)
    spec = replace(specs.from_config(files.config), eos_token_ids=eos_token_ids(files))
    device = resolve_device(deployment.device)
    digest = hashlib.sha256(f"{specs.digest(spec)} {library.fingerprint(files)}".encode()).hexdigest()
    return Plan(
        deployment=deployment,
        files=files,
        spec=spec,
        family=registry.family(spec.family),
        dtype=resolve_dtype(deployment.dtype, files.config, device),
        device=device,
        shards=ffn_shards(deployment.counts.ffn, deployment.ffn.sharding, spec.num_experts, deployment.ffn.tp),
        model_digest=digest,
    )


def eos_token_ids(files: library.ModelFiles) -> tuple[int, ...]:
    """The tokens that end an answer: those of config.json, and those of generation_config.json, where chat models name
    their end of turn. Raises CheckpointError when the latter are not integers."""
    named = files.generation_config.get("eos_token_id")
    found = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
        raise CheckpointError(f"generation_config.json of {files.name} has eos_token_id {named!r}, not token ids")
    return tuple(dict.fromkeys([*specs.from_config(files.config).eos_token_ids, *found]))


def num_threads(setting: int | str, workers_on_host: int) -> int:
    """Compute threads of one worker: the setting, or with "auto" this host's cores shared evenly, at least 1."""
    return setting if isinstance(setting, int) else max(1, len(os.sched_getaffinity(0)) // max(1, workers_on_host))


def spin_us(setting: int | str, workers_on_host: int) -> int:
    """Microseconds to poll before sleeping: the setting, or with "auto" long enough for one layer of the other side,
    unless workers must share cores, where whoever polls takes the core from whoever is waited for."""
    if isinstance(setting, int):
        return setting
    return 2000 if len(os.sched_getaffinity(0)) >= workers_on_host else 50


def pin(deployment: Deployment, role: Role, rank: int, workers_on_host: int) -> None:
    """Keeps the calling thread, and those it starts, on this worker's own share of the host's cores, so that workers
    neither meet on a core nor wander from it: attention workers have the first cores, FFN workers the next.

    Does nothing where cluster.pin_cores is off, the workers are on several hosts or outnumber the cores, or the system
    cannot.
    """
    counts = deployment.counts
    if not deployment.cluster.pin_cores or workers_on_host != counts.attention + counts.ffn:
        return
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // workers_on_host
    first = (rank + (counts.attention if role is Role.FFN else 0)) * share
    if share:
        os.sched_setaffinity(0, cores[first : first + share])
