"""A storm of malformed requests and of clients that leave, over raw connections, and what a server may answer to it."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

from tests.system import malformed
from tests.system.raw_http import Connection, connection

SECONDS = 30.0  # longest wait for an answer
STREAM = {"model": "tiny", "stream": True, "ignore_eos": True, "max_tokens": 50, "n": 2}


@dataclass
class Storm:
    """`bodies`, `heads` and `leavers` are how many there are; `num` connections at a time. `statuses` counts the
    answers, `wrong` has the ones that must not be, with what they answer."""

    url: str
    seed: int
    bodies: int
    heads: int
    leavers: int
    num: int = 32
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    closed: int = 0  # heads that were answered by hanging up
    left: int = 0

    async def run(self) -> None:
        """Raises TimeoutError for an answer that does not come."""
        rng = random.Random(self.seed)
        kinds = ["body"] * self.bodies + ["head"] * self.heads + ["leave"] * self.leavers
        rng.shuffle(kinds)
        turns = enumerate(kinds)
        await asyncio.gather(*(self._connection(turns) for _ in range(self.num)))

    async def _connection(self, turns: enumerate[str]) -> None:
        """Takes turns until there are none; bodies go over one connection while the server keeps it."""
        done = False
        while not done:
            async with connection(self.url) as kept:
                done = await self._turns(turns, kept)

    async def _turns(self, turns: enumerate[str], kept: Connection) -> bool:
        """True when there are no more; False when a new connection is needed."""
        for turn, kind in turns:
            rng = random.Random(f"{self.seed} {turn}")
            if kind == "head":
                await asyncio.wait_for(self._head(rng), SECONDS)
            elif kind == "leave":
                await asyncio.wait_for(self._leave(rng), SECONDS)
            elif not await asyncio.wait_for(self._body(rng, kept), SECONDS):
                return False
        return True

    async def _body(self, rng: random.Random, kept: Connection) -> bool:
        path, raw = malformed.body(rng)
        answer = await kept.ask(path, raw)
        self._judge(answer.status, path.encode() + b" " + raw, answer.body)
        return answer.headers.get("connection") != "close"

    async def _head(self, rng: random.Random) -> None:
        raw = malformed.head(rng)
        async with connection(self.url) as fresh:
            try:
                fresh.writer.write(raw)
                fresh.writer.write_eof()
                said = await fresh.reader.read()
            except OSError:  # it has hung up already
                said = b""
        self.closed += not said
        for line in said.split(b"HTTP/1.1 ")[1:]:
            self._judge(int(line[:3]), raw, line)

    async def _leave(self, rng: random.Random) -> None:
        """Hangs up in the middle of sending a request, of waiting for its answer, or of reading it."""
        stream, prompt = rng.random() < 0.8, [rng.randrange(256) for _ in range(8)]
        raw = json.dumps({**STREAM, "prompt": prompt, "stream": stream})
        async with connection(self.url) as leaving:
            if rng.random() < 0.2:
                head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n{raw}"
                leaving.writer.write(head[: rng.randrange(len(head))].encode())
                await leaving.writer.drain()
            else:
                leaving.send("/v1/completions", raw.encode())
                if stream and rng.random() < 0.8:
                    await leaving.reader.readexactly(rng.choice([1, 300, 900]))
                else:
                    await asyncio.sleep(rng.random() / 100)
        self.left += 1

    def _judge(self, status: int, asked: bytes, said: bytes) -> None:
        self.statuses[status] += 1
        late = status == 504 and b'"timeout"' in asked  # a deadline that was asked for
        if status != 100 and not (200 <= status < 300 or 400 <= status < 500 or late):
            self.wrong.append(f"{status} for {asked[:3000]!r}: {said[:300]!r}")
