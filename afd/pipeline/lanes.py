"""A picture as lanes, one for each worker, for a page that draws them: compact, since it is sent again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from afd.pipeline.analysis import Picture, Span, Worker
from afd.pipeline.timeline import Activity
from afd.types import Role

NOBODYS = -1  # a span that is about no microbatch, or about several

_Microbatch = tuple[int, int]  # attention_rank and the microbatch's number there

_WITHOUT = frozenset((Activity.OTHER, Activity.IDLE, Activity.WAIT, Activity.GATHER))  # about no microbatch


def as_json(picture: Picture) -> dict[str, object]:
    """Of each lane, three lists as long as it has spans: when each began, in us since the window's start (it ends where
    the next begins), and the places of its activity in `activities` and of its microbatch in `microbatches`."""
    known: dict[_Microbatch, int] = {}
    lanes = [_lane(picture, worker, known) for worker in picture.workers]
    return {
        "window_us": (picture.end_ns - picture.start_ns) // 1000,
        "activities": [activity.label for activity in Activity],
        "microbatches": [{"attention_rank": rank, "microbatch": microbatch} for rank, microbatch in known],
        "lanes": lanes,
    }


def _lane(picture: Picture, worker: Worker, known: dict[_Microbatch, int]) -> dict[str, object]:
    spans = list(picture.clipped(worker))
    owners = [(worker.rank, span.microbatch) for span in spans] if worker.role is Role.ATTENTION else _served(spans)
    return {
        "role": worker.role.value,
        "rank": worker.rank,
        "start_us": [(span.start_ns - picture.start_ns) // 1000 for span in spans],
        "activity": [int(span.activity) for span in spans],
        "microbatch": [
            NOBODYS if owner is None or span.activity in _WITHOUT else known.setdefault(owner, len(known))
            for span, owner in zip(spans, owners, strict=True)
        ],
    }


def _served(spans: Sequence[Span]) -> list[_Microbatch | None]:
    """Whom an FFN worker's spans are about. A call is about who is answered right behind it: None for several."""
    return list(_backwards(spans))[::-1]


def _backwards(spans: Sequence[Span]) -> Iterator[_Microbatch | None]:
    answered: set[_Microbatch] = set()
    for span in reversed(spans):
        if span.activity is Activity.FFN:
            yield answered.pop() if len(answered) == 1 else None
            answered.clear()
        else:
            if span.activity is Activity.COMBINE:
                answered.add((span.peer, span.microbatch))
            yield span.peer, span.microbatch
