"""A finished load test as files and as rows: what the terminal, the report and other programs are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from afd.errors import ConfigError
from afd.loadtest.cost import Cost
from afd.loadtest.measure import Spread
from afd.loadtest.prices import Worker
from afd.loadtest.session import Outcome
from afd.loadtest.sweep import Found


@dataclass(frozen=True, slots=True)
class Result:
    """`shares`: of each worker's time in the window, by activity."""

    setup: Mapping[str, str]
    outcome: Outcome
    shares: Mapping[Worker, Mapping[str, float]]
    cost: Cost | None = None
    sweep: Found | None = None

    def as_json(self) -> dict[str, object]:
        """summary.json; figures that do not exist are null."""
        measured = asdict(self.outcome.measured)
        return {
            "setup": dict(self.setup),
            **measured,
            "workers": {str(worker): dict(shares) for worker, shares in self.shares.items()},
            "cost": asdict(self.cost) if self.cost else None,
            "sweep": asdict(self.sweep) if self.sweep else None,
        }

    def latencies(self) -> dict[str, Spread]:
        """In seconds, by the name that people use."""
        m = self.outcome.measured
        return {"TTFT": m.ttft_s, "TPOT": m.tpot_s, "ITL": m.itl_s, "E2E": m.e2e_s}

    def figures(self) -> list[tuple[str, str]]:
        """What is no latency, in words."""
        m = self.outcome.measured
        rows = [
            ("requests", f"{m.sent} sent, {m.answered} answered, {m.counted} counted"),
            ("window", f"{m.window.seconds:.2f} s from {m.window.start_s:.2f} s on" + self._unsteady()),
            ("throughput", f"{m.requests_per_s:.3g} requests/s"),
            ("", f"{m.output_tokens_per_s:.1f} output tokens/s, {m.input_tokens_per_s:.1f} input tokens/s"),
            ("a request", f"{m.input_tokens:.1f} tokens in, {m.output_tokens:.1f} out" + self._counting()),
            ("in flight", f"{m.in_flight:.1f}"),
        ]
        if m.goodput is not None:
            rows += [
                ("goodput", f"{100 * m.goodput.share:.1f} % meet {m.goodput.slo}"),
                ("", f"{m.goodput.requests_per_s:.3g} requests/s, {m.goodput.output_tokens_per_s:.1f} output tokens/s"),
            ]
        if m.late_p99_s > 0.01:
            rows.append(("sent late", f"p99 {1e3 * m.late_p99_s:.0f} ms: this client could not keep up"))
        rows += [("errors", f"{status}: {e.count}, for example: {e.example}") for status, e in m.errors.items()]
        if self.sweep is not None:
            rows.append(("sweep", sweep_sentence(self.sweep)))
        return rows

    def costs(self) -> list[tuple[str, str, str, str]]:
        """What it is for, measured, in theory, and in theory at this batch: USD per million output tokens."""
        cost = self.cost
        if cost is None:
            return []
        theory = {part.role: part for part in cost.theory}
        rows = []
        for name, value in (("attention", cost.attention), ("ffn", cost.ffn), ("idle", cost.idle)):
            if value is not None:
                part = theory.get(name)
                card = f"{name} ({part.card} in theory)" if part else name
                rows.append((card, _usd(value), *((_usd(part.ideal), _usd(part.at_batch)) if part else ("", ""))))
        rows.append(("total", _usd(cost.total), _usd(cost.theory_ideal), _usd(cost.theory_at_batch)))
        return rows

    def _unsteady(self) -> str:
        return "" if self.outcome.measured.window.steady else "; no time of steady load, so this is the whole run"

    def _counting(self) -> str:
        return "" if self.outcome.measured.tokens_by_server else " (events counted: the server gave no usage)"


def sweep_sentence(found: Found) -> str:
    """What a sweep found."""
    if found.rate is None:
        return f"no rate down to {found.probes[-1].rate:g} requests/s meets the objectives; the figures are of that one"
    if not found.bounded:
        return f"every rate up to {found.rate:g} requests/s meets the objectives"
    return f"{found.rate:.4g} requests/s is the highest rate that meets the objectives"


def write(folder: Path, result: Result, page: str) -> None:
    """requests.jsonl, summary.json and report.html into `folder`. Raises ConfigError when it cannot be written."""
    lines = [orjson.dumps(record.as_json(), option=orjson.OPT_APPEND_NEWLINE) for record in result.outcome.run.records]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "requests.jsonl").write_bytes(b"".join(lines))
        (folder / "summary.json").write_bytes(orjson.dumps(result.as_json(), option=orjson.OPT_INDENT_2))
        (folder / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} (--output): {error.strerror}") from error


def _usd(value: float | None) -> str:
    return "" if value is None else f"${value:.4g}"
