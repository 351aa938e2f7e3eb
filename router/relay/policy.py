"""Which attention worker takes a request. Pure: a request and counts in, an attention_rank out.

POLICIES is where another policy plugs in: a Policy under a name, chosen by router.policy in the deployment file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from afd.errors import ConfigError
from afd.token_blocks import extend_names
from afd.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class Load:
    """What one attention worker has to do, queued or running: this router's requests, and as far as the worker has
    told, other routers'. `free_tokens` is what its KV cache still holds; None: it has not told."""

    attention_rank: int
    requests: int
    tokens: int  # prompts and answers so far
    free_tokens: int | None = None

    def lacks_room(self, num_tokens: int) -> bool:
        """Whether `num_tokens` more tokens would have to wait for KV blocks."""
        return self.free_tokens is not None and self.free_tokens < num_tokens


class Policy(ABC):
    """Chooses among workers that can take a request. May keep state between calls; called on one thread."""

    @abstractmethod
    def choose(self, request: GenerateRequest, session: str, loads: Sequence[Load]) -> int:
        """The attention_rank to use. `loads` is never empty and sorted by attention_rank; requests of one `session`
        belong together ("": of none)."""

    def forget(self, attention_rank: int) -> None:  # noqa: B027 - most remember nothing
        """This worker is gone; one that comes under its rank knows nothing of what it was sent."""


class LeastLoaded(Policy):
    """The worker whose KV cache has room for the prompt, then with the fewest tokens in flight, then the fewest
    requests, then the lowest attention_rank."""

    def choose(self, request: GenerateRequest, session: str, loads: Sequence[Load]) -> int:  # noqa: ARG002
        return _least_loaded(loads, request.num_tokens).attention_rank


class RoundRobin(Policy):
    """Each worker in turn, whatever its load."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: GenerateRequest, session: str, loads: Sequence[Load]) -> int:  # noqa: ARG002
        ranks = [load.attention_rank for load in loads]
        self._last = next((rank for rank in ranks if rank > self._last), ranks[0])
        return self._last


class Session(Policy):
    """A session's worker by a hash, the same at every router; while that worker is gone, only its sessions move, and
    spread over the others. Requests of no session go by load."""

    def choose(self, request: GenerateRequest, session: str, loads: Sequence[Load]) -> int:
        if not session:
            return _least_loaded(loads, request.num_tokens).attention_rank
        return max((load.attention_rank for load in loads), key=lambda rank: _lot(session, rank))


class Prefix(Policy):
    """The worker that has been sent the beginning of this prompt before, by blocks of `block_size` tokens, of which it
    remembers the `memory` last ones of each worker. By load where less than half of the prompt is known, among equals,
    and where the favourite is overloaded: it has more than OVERLOAD times the requests of the least loaded worker and
    SLACK on top, or lacks the room that the other has.

    So it may be SLACK requests ahead of a worker that has none, however long they are: it computes only what is new of
    each, requests decoded together slow one another little, and what is too long for all of them is a lack of room."""

    OVERLOAD = 1.5
    SLACK = 32

    def __init__(self, block_size: int = 64, memory: int = 16384) -> None:
        self._block_size = block_size
        self._memory = memory
        self._seen: dict[int, OrderedDict[bytes, None]] = {}  # by attention_rank, the oldest first
        self._named: tuple[tuple[int, ...], str, list[bytes]] = ((), "", [])  # the last prompt, its salt, its blocks

    def choose(self, request: GenerateRequest, session: str, loads: Sequence[Load]) -> int:  # noqa: ARG002
        names = self._names(request)
        length = request.num_tokens
        chosen = _least_loaded(loads, length)
        known = {load.attention_rank: self._known(load.attention_rank, names) for load in loads}
        most = max(known.values())
        if 2 * most * self._block_size >= length:
            rest = length - most * self._block_size
            favourite = _least_loaded([load for load in loads if known[load.attention_rank] == most], rest)
            if not self._overloaded(favourite, chosen, rest):
                chosen = favourite
        self._remember(chosen.attention_rank, names)
        return chosen.attention_rank

    def forget(self, attention_rank: int) -> None:
        self._seen.pop(attention_rank, None)

    def _names(self, request: GenerateRequest) -> list[bytes]:
        """Of the prompt's blocks. The choices of one prompt come one behind the other, with the same tuple."""
        prompt, salt, names = self._named
        if prompt is not request.prompt_token_ids or salt != request.cache_salt:
            prompt, salt, names = request.prompt_token_ids, request.cache_salt, []
            extend_names(names, prompt, self._block_size, salt)
            self._named = (prompt, salt, names)
        return names

    def _overloaded(self, favourite: Load, least: Load, rest: int) -> bool:
        busy = favourite.requests > self.OVERLOAD * least.requests + self.SLACK
        return busy or (favourite.lacks_room(rest) and not least.lacks_room(rest))

    def _known(self, attention_rank: int, names: Iterable[bytes]) -> int:
        """How many of `names`, from the first, the worker has been sent."""
        seen = self._seen.setdefault(attention_rank, OrderedDict())
        count = 0
        for name in names:
            if name not in seen:
                break
            count += 1
        return count

    def _remember(self, attention_rank: int, names: Sequence[bytes]) -> None:
        """The end first: a block is of no use without those before it, so it must not outlive them."""
        seen = self._seen[attention_rank]
        for name in reversed(names):
            seen[name] = None
            seen.move_to_end(name)
        while len(seen) > self._memory:
            seen.popitem(last=False)


POLICIES: dict[str, Callable[[], Policy]] = {
    "prefix": Prefix,
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
    "session": Session,
}


def create(name: str) -> Policy:
    """Raises ConfigError, listing the choices, for a name that is not in POLICIES."""
    if name not in POLICIES:
        raise ConfigError(f"router policy is {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()


def _least_loaded(loads: Sequence[Load], num_tokens: int) -> Load:
    return min(loads, key=lambda load: (load.lacks_room(num_tokens), load.tokens, load.requests, load.attention_rank))


def _lot(session: str, attention_rank: int) -> bytes:
    """The highest of the workers' lots has the session."""
    return blake2b(f"{attention_rank} {session}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
