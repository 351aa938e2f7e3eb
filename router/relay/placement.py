"""Which worker has which choice of a job: each has one at a time, and goes on at another when that is lost or refuses.

What goes on elsewhere is a replay: the prompt, the tokens that came, and the same seed. A worker's tokens are a
function of these alone, so the other one continues with the very tokens that the first would have sent. They come
through one inbox: those of the first worker, then the word that it is lost, and only then those of the next.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from functools import partial

from afd.errors import TransportError, Unavailable
from afd.rpc.attention_client import AttentionClient, Inbox
from afd.types import GenerateOutput, GenerateRequest
from router.answers.choice import Choice
from router.relay.pool import Pool
from router.relay.stranded import Castaway
from router.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

# A request that has lost so many workers without a token in between may be what kills them.
MOST_LOSSES = 3


@dataclass(slots=True)
class _Place:
    """Where a choice is, and what befell it since its last token."""

    client: AttentionClient | None = None  # None: it waits for one
    num_tokens: int = 0  # of the answer, when it came here
    tried: list[AttentionClient] = field(default_factory=list)
    losses: int = 0
    until: float | None = None  # the loop time until which it may wait for a worker


class Placement:
    """For the choices of one job, of one `session`. Their outputs come through `inbox`."""

    def __init__(self, pool: Pool, metrics: Metrics, session: str) -> None:
        self.inbox = Inbox()
        self._pool = pool
        self._metrics = metrics
        self._session = session
        self._places: dict[str, _Place] = {}

    def start(self, request: GenerateRequest) -> None:
        """Raises Unavailable when no worker can take it."""
        client = self._pool.submit(request, self.inbox, self._session)
        self._places[request.request_id] = _Place(client)

    def cancel(self, request_id: str) -> None:
        """No output of it arrives after this."""
        place = self._places.pop(request_id)
        if place.client is not None:
            place.client.cancel(request_id)
        else:
            self._pool.stranded.remove(request_id)

    def ended(self, request_id: str) -> None:
        """Its worker has said its last word."""
        del self._places[request_id]

    def move(self, choice: Choice, output: GenerateOutput) -> GenerateOutput | None:
        """Sends a choice, which its worker ended with the refusal `output`, to another one, now or when there is one.
        Returns None; or, where that cannot be, the output that ends it."""
        place = self._places[choice.request.request_id]
        assert place.client is not None, "refused by nobody"
        if choice.num_tokens > place.num_tokens:
            place.num_tokens, place.tried, place.losses, place.until = choice.num_tokens, [], 0, None
        place.tried.append(place.client)
        place.losses += place.client.lost != ""
        if place.losses >= MOST_LOSSES:
            enough = f"{MOST_LOSSES} workers in a row were lost with this request, and no other gets it"
            return replace(output, error=f"{output.error}; {enough}")
        full = output.refused == "full"
        request = choice.request if full else choice.replay()
        try:
            client = self._pool.submit(request, self.inbox, self._session, place.tried)
        except (Unavailable, TransportError):
            return None if not full and self._waits(place, request, output.error) else output
        self._sent(place, request, client)
        return None

    def _waits(self, place: _Place, request: GenerateRequest, why: str) -> bool:
        """Whether it may."""
        stranded, now = self._pool.stranded, asyncio.get_running_loop().time()
        place.until = now + stranded.patience_s if place.until is None else place.until
        if now >= place.until:
            return False
        place.client, place.tried = None, []  # who refused it may be another by then
        taken = partial(self._sent, place, request)
        stranded.add(Castaway(request, self.inbox, self._session, why, place.until, taken))
        return True

    def _sent(self, place: _Place, request: GenerateRequest, client: AttentionClient) -> None:
        place.client = client
        (self._metrics.replays if request.generated_token_ids else self._metrics.retries).inc()
        log.info("%s goes on at %s behind %d tokens", request.request_id, client.peer, len(request.generated_token_ids))
