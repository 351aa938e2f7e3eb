"""Service-level objectives: the latencies a request must stay under to be of use."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.loadtest.record import Record

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_TIME = re.compile(r"([0-9.]+(?:e-?[0-9]+)?)(us|ms|s)")


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits in seconds; infinite where none was given."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    e2e_s: float = math.inf

    @staticmethod
    def parse(text: str) -> Slo:
        """`ttft=500ms,tpot=50ms,e2e=10s`, any of them. Raises ConfigError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            match = _TIME.fullmatch(value.strip())
            if name not in ("ttft", "tpot", "e2e") or name in limits or match is None:
                raise ConfigError(f"--slo holds {part!r}; it is like ttft=500ms,tpot=50ms,e2e=10s, each at most once")
            try:
                limits[name] = float(match[1]) * _UNITS_S[match[2]]
            except ValueError as error:
                raise ConfigError(f"--slo holds {part!r}, which is no number") from error
        return Slo(**{f"{name}_s": limit for name, limit in limits.items()})

    def met_by(self, record: Record) -> bool:
        """Whether the request was answered in time. One token has no time per token, and so is within any."""
        if not record.ok or record.ttft_s is None:
            return False
        return (
            record.ttft_s <= self.ttft_s
            and (record.tpot_s is None or record.tpot_s <= self.tpot_s)
            and record.e2e_s <= self.e2e_s
        )

    def __str__(self) -> str:
        limits = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}
        return ", ".join(f"{name} ≤ {1e3 * s:g} ms" for name, s in limits.items() if s < math.inf)
