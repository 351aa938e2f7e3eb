"""Records made by hand, for the arithmetic's tests."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from afd.loadtest.record import OK, Record


def record(
    sent_s: float, times: Iterable[float], *, tokens: int | None = None, inputs: int = 10, status: str = OK
) -> Record:
    """A request sent at `sent_s` whose events came at `times`, and which ended with the last."""
    came = array("d", times)
    end_s = came[-1] if came else sent_s
    return Record(
        index=0,
        due_s=sent_s,
        input_tokens=inputs,
        asked_tokens=len(came),
        sent_s=sent_s,
        end_s=end_s,
        last_s=end_s,
        times=came,
        output_tokens=len(came) if tokens is None else tokens,
        counted=True,
        status=status,
        error="" if status == OK else f"it was {status}",
    )


def even(sent_s: float, first_s: float, step_s: float, tokens: int) -> Record:
    """First token after `first_s`, then one every `step_s`."""
    return record(sent_s, [sent_s + first_s + step_s * i for i in range(tokens)])
