"""Both halves in one process, no wire: the engine's own step with the FFN half called.

python whole_child.py MODEL DTYPE THREADS
"""

from __future__ import annotations

import sys
import time

import torch
from answering import answers, serve

from afd import build
from afd.config import Deployment
from afd.layers.attention.registry import kernel
from afd.models.halves import no_grad
from afd.topology import FfnShard
from afd.types import GenerateOutput, GenerateRequest, Role, SamplingParams
from attention_worker.block_manager import BlockManager
from attention_worker.kv_cache import KvCache
from attention_worker.microbatch import Microbatch, Pause
from attention_worker.requests import Requests
from attention_worker.sampler import Sampler
from attention_worker.scheduler import Scheduler

BLOCK_SIZE = 16


class Whole:
    """One microbatch at a time, as an engine with `microbatches: 1` would run it."""

    def __init__(self, plan: build.Plan) -> None:
        self._plan = plan
        self._kernels = build.attention_kernels(plan, BLOCK_SIZE)
        one = FfnShard(0, 1, 1)
        self._attention = plan.family.attention(plan.spec, plan.weights(Role.ATTENTION), self._kernels)
        self._ffn = plan.family.ffn(plan.spec, plan.weights(Role.FFN, one), one, self._kernels)
        self._cache, self._blocks = self._allocate(1), 1

    def run(self, prompts: list[list[int]], tokens: int) -> list[list[float]]:
        """Each stream's tokens' times."""
        longest = max(map(len, prompts)) + tokens
        blocks = len(prompts) * (-(-longest // BLOCK_SIZE) + 1) + 1
        if blocks > self._blocks:
            self._cache, self._blocks = self._allocate(blocks), blocks
        arrivals: list[list[float]] = [[] for _ in prompts]

        def publish(outputs: list[tuple[int, GenerateOutput]]) -> None:
            now = time.perf_counter()
            for _, output in outputs:
                assert output.finish_reason != "error", output.error
                arrivals[int(output.request_id)] += [now] * len(output.tokens)

        batch_tokens = self._plan.deployment.attention.max_batch_tokens
        manager = BlockManager(self._blocks, BLOCK_SIZE)
        scheduler = Scheduler(manager, microbatches=1, max_batch_tokens=batch_tokens, max_running=len(prompts))
        vocab = self._plan.spec.vocab
        book = Requests(scheduler, publish, vocab=vocab, eos_token_ids=(), max_context=longest, max_waiting=10**6)
        microbatch = Microbatch(0, self._attention, self._cache, scheduler, Sampler(()), book.complete)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            book.add(0, GenerateRequest(str(i), tuple(prompt), params))
        with no_grad():
            steps = microbatch.run()
            asked = next(steps)
            while asked is not None:
                if isinstance(asked, Pause):
                    asked = next(steps)
                else:
                    asked = steps.send(self._ffn.layer(asked.layer, asked.y, asked.routing))
                book.flush()
        return arrivals

    def _allocate(self, num_blocks: int) -> KvCache:
        plan, paged = self._plan, kernel("native" if self._kernels else "batched")
        return KvCache(plan.spec, num_blocks, BLOCK_SIZE, plan.torch_dtype, plan.device, paged)


def main() -> None:
    answer = answers()
    model, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    plan = build.plan(Deployment().with_flags({"model": model, "dtype": dtype}))
    serve(answer, Whole(plan).run)


if __name__ == "__main__":
    main()
