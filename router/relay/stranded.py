"""Requests that lost their worker while no other could take them: they wait for one, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from afd.errors import TransportError, Unavailable
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import GenerateOutput, GenerateRequest

# Sends a request of a session to some worker and returns its client. Raises Unavailable or TransportError.
Submit = Callable[[GenerateRequest, Inbox, str], AttentionClient]


@dataclass(frozen=True, slots=True)
class Castaway:
    """A request without a worker. `why`: how it lost its own, a sentence. Until the loop time `until` it waits, then
    `inbox` gets an error; when a worker has it, `taken` is told which."""

    request: GenerateRequest
    inbox: Inbox
    session: str
    why: str
    until: float
    taken: Callable[[AttentionClient], None]


class Stranded:
    """The oldest first. Whoever learns of workers calls `retry` from time to time. Belongs to one event loop.

    `patience_s` (router.replay_s) is how long a request may be here, over all of its stays since its last token; 0: no
    request waits.
    """

    def __init__(self, submit: Submit, patience_s: float) -> None:
        self.patience_s = patience_s
        self._submit = submit
        self._castaways: dict[str, Castaway] = {}
        self._ended = ""

    def __len__(self) -> int:
        return len(self._castaways)

    def add(self, castaway: Castaway) -> None:
        """Its next chance is the next `retry`."""
        if self._ended:
            self._tell(castaway, self._ended)
        else:
            self._castaways[castaway.request.request_id] = castaway

    def remove(self, request_id: str) -> None:
        """Nobody wants its answer any more. Unknown ids are ignored."""
        self._castaways.pop(request_id, None)

    def retry(self) -> None:
        """Sends on whom some worker can take, and gives up who has waited too long."""
        now = asyncio.get_running_loop().time()
        for request_id, castaway in list(self._castaways.items()):
            try:
                client = self._submit(castaway.request, castaway.inbox, castaway.session)
            except (Unavailable, TransportError) as error:
                if now >= castaway.until:
                    del self._castaways[request_id]
                    late = f"for {self.patience_s:g} s (router.replay_s) no other attention worker could take it over"
                    self._tell(castaway, f"{castaway.why}; {late}: {error}")
            else:
                del self._castaways[request_id]
                castaway.taken(client)

    def end(self, sentence: str) -> None:
        """Gives up everybody with `sentence`; from now on nobody waits."""
        self._ended = sentence
        castaways, self._castaways = self._castaways, {}
        for castaway in castaways.values():
            self._tell(castaway, sentence)

    @staticmethod
    def _tell(castaway: Castaway, sentence: str) -> None:
        castaway.inbox.put(GenerateOutput(castaway.request.request_id, finish_reason="error", error=sentence))
