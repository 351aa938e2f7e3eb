"""What happened to one request, and how its latencies are defined."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import pairwise

OK, TIMEOUT, CUT, NO_CONNECTION, CANCELLED = "ok", "timeout", "cut", "no connection", "cancelled"
IN_STREAM = "error in stream"


@dataclass(slots=True)
class Record:
    """Times are seconds since the run began. `status`: OK, the HTTP status of a refusal, or one of the words above;
    "" while it runs. `times`: when each event with text came; it may hold more than one token."""

    index: int
    due_s: float  # when the arrivals wanted it sent
    input_tokens: int  # what was sent, as far as known; the server's count once it has said
    asked_tokens: int  # max_tokens
    sent_s: float = 0.0
    end_s: float = 0.0  # the answer's end, or the error
    last_s: float = 0.0  # the last event that had text, or said why the answer ends
    times: array[float] = field(default_factory=lambda: array("d"))
    output_tokens: int = 0
    counted: bool = False  # output_tokens is the server's count (usage), not the number of events
    status: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first text: time to first token."""
        return self.times[0] - self.sent_s if self.times else None

    @property
    def e2e_s(self) -> float:
        """From sending to the answer's end."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of one token."""
        if self.output_tokens < 2 or not self.times:
            return None
        return (max(self.last_s, self.times[-1]) - self.times[0]) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Between events that follow one another: inter-token latencies, where an event is a token."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def tokens_per_event(self) -> float:
        return self.output_tokens / len(self.times) if self.times else 0.0

    def as_json(self) -> dict[str, object]:
        """A line of requests.jsonl."""
        return {
            "index": self.index,
            "status": self.status,
            "error": self.error,
            "due_s": round(self.due_s, 6),
            "sent_s": round(self.sent_s, 6),
            "end_s": round(self.end_s, 6),
            "input_tokens": self.input_tokens,
            "asked_tokens": self.asked_tokens,
            "output_tokens": self.output_tokens,
            "tokens_counted_by_server": self.counted,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "e2e_s": self.e2e_s,
            "times_s": [round(at, 6) for at in self.times],
        }
