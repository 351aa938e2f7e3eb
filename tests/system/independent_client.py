"""Another client for the same load, with nothing of ours in it: plain asyncio streams and json.

    python tests/system/independent_client.py URL STREAMS INPUT_TOKENS OUTPUT_TOKENS

STREAMS requests at once; prints JSON: tokens per second while all of them decode, and the median time per output token.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time


async def stream(host: str, port: int, prompt: list[int], max_tokens: int) -> list[tuple[float, int]]:
    """When each token came; every event carries its tokens' ids, so that none is without one."""
    fields: dict[str, object] = {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body = json.dumps(fields | {"stream": True, "ignore_eos": True, "return_token_ids": True}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    came = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            ids = [token for choice in json.loads(line[6:])["choices"] for token in choice.get("token_ids") or ()]
            came += [(time.perf_counter(), token) for token in ids]
    writer.close()
    return came


async def main(url: str, streams: int, inputs: int, outputs: int) -> None:
    host, port = url.removeprefix("http://").split(":")
    rng = random.Random(99)
    prompts = [[rng.randrange(256, 49_000) for _ in range(inputs)] for _ in range(streams)]
    answers = await asyncio.gather(*(stream(host, int(port), prompt, outputs) for prompt in prompts))
    assert all(len(came) == outputs for came in answers), [len(came) for came in answers]
    begin, end = max(came[0][0] for came in answers), min(came[-1][0] for came in answers)
    tokens = sum(begin <= at < end for came in answers for at, _ in came)
    tpot = statistics.median((came[-1][0] - came[0][0]) / (outputs - 1) for came in answers)
    print(json.dumps({"output_tokens_per_s": tokens / (end - begin), "tpot_p50_s": tpot}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
