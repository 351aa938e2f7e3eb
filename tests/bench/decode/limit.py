"""What this machine would allow: the model's FLOPs at the measured GEMM rate, its bytes at the measured bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from afd.native import library
from afd.native.packed import DTYPES, PackedLinear
from afd.spec import ModelSpec
from afd.types import DType, Role

ROWS, WIDTH = 512, 1024
COPY_BYTES = 64 << 20


@dataclass(frozen=True)
class Machine:
    """All cores together; the best of what was measured. `gemm_by`: whose product was the faster one."""

    gemm_flops: float  # per second
    gemm_by: str
    copy_bytes: float  # per second, read and written

    def best(self, other: Machine) -> Machine:
        faster = max(self, other, key=lambda machine: machine.gemm_flops)
        return Machine(faster.gemm_flops, faster.gemm_by, max(self.copy_bytes, other.copy_bytes))


def measure_machine(dtype: torch.dtype, threads: int) -> Machine:
    """Takes about a second; nothing else should run."""
    torch.set_num_threads(threads)
    x, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(WIDTH, WIDTH).to(dtype)
    products: dict[str, Callable[[], object]] = {"torch": lambda: x @ weight}
    kernels = library.load()
    if kernels is not None and dtype in DTYPES:
        packed = PackedLinear(kernels, weight)
        products["compiled"] = lambda: packed(x)
    seconds = {name: min(_timed(product) for _ in range(20)) for name, product in products.items()}
    fastest = min(seconds, key=lambda name: seconds[name])
    big = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(big)
    copy = min(_timed(lambda: target.copy_(big)) for _ in range(5))
    return Machine(2 * ROWS * WIDTH * WIDTH / seconds[fastest], fastest, 2 * COPY_BYTES / copy)


def decode_limit(spec: ModelSpec, dtype: DType, streams: int, context: int, machine: Machine) -> float:
    """Tokens per second if each step took the longer of its FLOPs at the GEMM rate and its bytes at the bandwidth."""
    flops = spec.half_flops_per_token(Role.ATTENTION, context) + spec.half_flops_per_token(Role.FFN, context)
    weights = spec.weight_bytes(Role.ATTENTION, dtype) + spec.weight_bytes(Role.FFN, dtype)
    if spec.moe:
        one = 3 * spec.hidden * spec.moe.intermediate * dtype.itemsize * len(spec.moe_layers)
        weights -= max(0, spec.moe.experts - streams * spec.moe.top_k) * one
    kv = streams * context * spec.kv_bytes_per_token(dtype)
    return streams / max(flops * streams / machine.gemm_flops, (weights + kv) / machine.copy_bytes)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
