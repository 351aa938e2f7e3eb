"""What this machine's memory and products reach, measured: `python -m afd.machine` prints a line of JSON.

A process of its own, so that whoever asks need not load torch, and threads left behind by others do not disturb it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

_BUFFER_BYTES = 256 << 20  # well beyond the caches
_GEMM = (256, 2048, 2048)  # rows, width in, width out: a batch at the FFN
_BEST_OF = 5


@dataclass(frozen=True)
class Measured:
    """Bytes and FLOPs per second, with every core that this process may use (or the GPU, where there is one)."""

    device: str
    read_bytes_per_s: float
    copy_bytes_per_s: float
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float


def measure() -> Measured:
    """A few seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    numbers = torch.ones(_BUFFER_BYTES // 4, device=device)  # fp32
    copy = torch.empty_like(numbers)
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    else:
        name, memory = "cpu", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Measured(
        name,
        _BUFFER_BYTES / _seconds(device, lambda: numbers.sum()),
        _BUFFER_BYTES / _seconds(device, lambda: copy.copy_(numbers)),
        _gemm_flops(device, torch.bfloat16),
        _gemm_flops(device, torch.float32),
        memory,
    )


def _gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    rows, into, out = _GEMM
    x, w = torch.randn(rows, into, device=device, dtype=dtype), torch.randn(out, into, device=device, dtype=dtype)
    return 2.0 * rows * into * out / _seconds(device, lambda: x @ w.T)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The best of some runs, after one that warms up."""
    best = float("inf")
    for _ in range(1 + _BEST_OF):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))
