"""One attention worker as a router sees it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from afd.rpc.attention_client import AttentionClient
from afd.rpc.convert import AttentionStatus
from afd.types import WorkerView
from router.relay.policy import Load

SILENT_QUESTIONS = 2  # one alone may have gone unanswered because this process was frozen itself


@dataclass(slots=True)
class Member:
    """One attention worker: how the controller sees it, and the connection once there is one."""

    worker: WorkerView
    client: AttentionClient | None = None
    status: AttentionStatus | None = None  # the last one heard,
    asked_at: float = 0.0  # the loop time when that was asked for,
    own: tuple[int, int] = (0, 0)  # and this router's requests and tokens there when it came
    answered_at: float = 0.0  # the loop time of the last answer,
    unanswered: int = 0  # and how many questions there were since
    leaving: bool = False  # it has handed its requests over, and gets no more
    task: asyncio.Task[None] | None = field(default=None, repr=False)  # connecting, or asking for progress

    @property
    def usable(self) -> bool:
        """Whether new requests may go there."""
        draining = self.status is not None and self.status.state == "draining"
        serves = self.worker.state in ("ready", "recovering") and not draining and not self.leaving
        return serves and self.client is not None and not self.client.lost

    @property
    def answers(self) -> bool:
        """Whether it says how it is when asked. One that does not may only be busy, or about to be found lost."""
        return self.unanswered < SILENT_QUESTIONS

    def load(self, client: AttentionClient) -> Load:
        """What the policy is told: this router's part as it is now, the rest as the worker told it last."""
        requests, tokens = client.num_requests, client.num_tokens
        if self.status is None or self.status.blocks_total == 0:
            return Load(self.worker.rank, requests, tokens)
        others = max(0, self.status.running + self.status.waiting - self.own[0])
        others_tokens = max(0, self.status.running_tokens + self.status.waiting_tokens - self.own[1])
        free = self.status.free_tokens - max(0, tokens - self.own[1])
        return Load(self.worker.rank, requests + others, tokens + others_tokens, free)
