"""What the compiled CPU kernels reach of this machine's limits, beside plain torch.

    PYTHONPATH=. python tests/bench/bench_kernels.py [--threads 1] [--dtype bf16]

Limits are measured in the same run: memory bandwidth as the best of a copy (bytes read and written) and a sum (bytes
read), arithmetic as the best packed product. Times are the best of several passes over data that no cache holds: 30
layers' weights, or a KV cache of random blocks. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.layers.attention.base import AttentionBatch
from afd.layers.attention.registry import kernel
from afd.native.halves import NativeFfnLayer
from afd.native.library import load
from afd.native.packed import PackedLinear

PASSES = 5


def best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def bandwidth() -> float:
    """Bytes per second."""
    big = torch.ones(1 << 28, dtype=torch.uint8)
    target, words = torch.empty_like(big), big.view(torch.int64)
    return max(2 * big.nbytes / best_s(lambda: target.copy_(big)), big.nbytes / best_s(lambda: words.sum()))


def products(library: Any, dtype: torch.dtype, rows: list[int]) -> list[dict[str, Any]]:
    found = []
    for n, k in ((3072, 576), (576, 1536), (49152, 576)):
        weights = [torch.randn(n, k).to(dtype) for _ in range(30 if n < 10000 else 2)]
        packed = [PackedLinear(library, weight) for weight in weights]
        for m in rows:
            x = torch.randn(m, k).to(dtype)
            ours = best_s(lambda x=x, p=packed: [linear(x) for linear in p]) / len(weights)
            torchs = best_s(lambda x=x, w=weights: [F.linear(x, weight) for weight in w]) / len(weights)
            found.append({
                "what": f"product {m} x {k} x {n}", "us": ours * 1e6, "torch_us": torchs * 1e6,
                "gflops": 2 * m * n * k / ours / 1e9, "gbytes": weights[0].nbytes / ours / 1e9,
            })  # fmt: skip
    return found


def attention(
    dtype: torch.dtype, batch: int, context: int, heads: int, kv_heads: int, dim: int, plain: bool = True
) -> dict[str, Any]:
    """One layer's decode step."""
    blocks = -(-context // 16)
    order = torch.randperm(batch * blocks).view(batch, blocks).tolist()
    step = AttentionBatch.build([1] * batch, [context] * batch, order, 16)
    q = torch.randn(batch, heads, dim).to(dtype)
    times = []
    for name in ("native", "batched") if plain else ("native",):
        by = kernel(name)
        cache = by.allocate(batch * blocks, 16, kv_heads, dim, dtype, torch.device("cpu"))
        for tensor in cache:
            tensor.normal_()
        times.append(best_s(lambda by=by, cache=cache: by.attend(q, *cache, step, dim**-0.5)))
    kv_bytes = 2 * batch * context * kv_heads * dim * dtype.itemsize
    return {
        "what": f"attention, batch {batch}, context {context}, {heads}/{kv_heads} heads of {dim}",
        "us": times[0] * 1e6, "torch_us": times[1] * 1e6 if plain else None,
        "gflops": 4 * batch * context * heads * dim / times[0] / 1e9, "gbytes": kv_bytes / times[0] / 1e9,
    }  # fmt: skip


def sdpa(dtype: torch.dtype, batch: int, context: int, heads: int, kv_heads: int, dim: int) -> float:
    """GB/s of KV by torch's own attention over contiguous caches."""
    q = torch.randn(batch, heads, 1, dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, context, dim).to(dtype) for _ in range(2))
    took = best_s(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    return 2 * k.nbytes / took / 1e9


def experts(library: Any, dtype: torch.dtype, total: int, used: int, rows: int) -> dict[str, Any]:
    """A layer of `total` experts (hidden 576, width 512, top 2) of which the tokens choose among `used`."""
    hidden, width = 576, 512
    gate, up = (torch.randn(total, width, hidden).to(dtype) for _ in range(2))
    layer = NativeFfnLayer(
        library, hidden, dtype, None, (gate, up, torch.randn(total, hidden, width).to(dtype)), 0, total
    )
    y = torch.randn(rows, hidden).to(dtype)
    ids = torch.stack([torch.randperm(used)[:2] for _ in range(rows)]).int()
    weights: Tensor = torch.rand(rows, 2)
    took = best_s(lambda: [layer(y, ids, weights) for _ in range(5)]) / 5
    flops = 2 * rows * 3 * 2 * hidden * width
    return {
        "what": f"experts, {rows} tokens, {used} of {total} chosen, top 2", "us": took * 1e6, "torch_us": None,
        "gflops": flops / took / 1e9, "gbytes": used * 3 * hidden * width * dtype.itemsize / took / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 21, 32, 64, 512])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    library = load()
    assert library is not None, "nothing to measure without a compiler"
    with torch.inference_mode():
        memory = bandwidth()
        rows = products(library, dtype, options.rows)
        peak = max(row["gflops"] for row in rows)
        for batch, context, *sizes in (
            (64, 160, 9, 3, 64),
            (64, 1024, 9, 3, 64),
            (16, 8192, 9, 3, 64),
            (16, 8192, 9, 1, 192),
        ):
            rows.append(attention(dtype, batch, context, *sizes))
        rows.append(attention(dtype, 8, 8192, 64, 1, 256, plain=False))  # Step-3's own
        for used, total in ((8, 8), (8, 64), (8, 256)):
            rows.append(experts(library, dtype, total, used, 32))
        torchs = sdpa(dtype, 16, 8192, 9, 3, 64)
        memory = max(memory, bandwidth())
    print(
        f"{options.dtype}, {options.threads} thread(s); memory {memory / 1e9:.1f} GB/s, best product {peak:.0f} GFLOP/s"
    )
    print(
        "| kernel | µs | plain torch, µs | GFLOP/s | of the best product | GB/s | of memory |\n"
        "|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['what']} | {row['us']:.0f} | {row['torch_us'] or float('nan'):.0f} | {row['gflops']:.0f} | "
            f"{row['gflops'] / peak:.0%} | {row['gbytes']:.1f} | {row['gbytes'] * 1e9 / memory:.0%} |"
        )
    print(f"torch SDPA, batch 16, context 8192, 9/3 heads of 64, contiguous: {torchs:.1f} GB/s of KV")
    print(json.dumps({"dtype": options.dtype, "threads": options.threads, "memory_gbytes": memory / 1e9,
                      "peak_gflops": peak, "sdpa_gbytes": torchs, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
