"""What `afd top` shows at one moment, from two of the router's answers to GET /status/pipeline. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One worker. None: it has not said, or has no such thing. Rates are those since the earlier answer."""

    name: str
    state: str
    busy: float | None
    running: int | None = None
    waiting: int | None = None
    kv_share: float | None = None  # of the blocks there are
    tokens_per_s: float | None = None  # generated
    calls_per_s: float | None = None  # of the FFN


@dataclass(frozen=True, slots=True)
class Side:
    """The workers of a role over the timelines' window: shares of their time. `bubbles`, by cause, are the rest."""

    role: str
    busy: float
    bubbles: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Latency:
    """Of what happened between the two answers, in seconds; None: nothing did."""

    p50: float | None
    p95: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """`window_s` and what follows are of the workers' timelines; None where there are none."""

    heading: str
    problems: tuple[str, ...]
    rows: tuple[Row, ...]
    tokens_per_s: float | None
    running: int
    waiting: int
    waiting_tokens: int  # prompt tokens not computed yet
    first_token: Latency
    inter_token: Latency
    tokens_per_expert_call: float | None
    window_s: float | None
    sides: tuple[Side, ...] = ()
    efficiency: float | None = None
    tokens_per_ffn_call: float | None = None
    wire_bytes_per_token: float | None = None


def frame(before: Json, now: Json) -> Frame:
    """What `now` says, and how it differs from `before`, an earlier answer, if it is of the same run.

    Raises KeyError, TypeError or ValueError for what is no answer of a router of ours.
    """
    if before["epoch"] != now["epoch"]:
        before = now
    statuses = [w["status"] or {} for w in now["workers"] if w["role"] == "attention"]
    said = [now["problem"], *(w["message"] for w in now["workers"]), now["timeline_problem"]]
    was, counted, timeline = before["counted"], now["counted"], now["timeline"]
    calls = counted["expert_calls"] - was["expert_calls"]
    return Frame(
        heading=f"{now['model']} as {now['topology']}, run {now['epoch']}",
        problems=tuple(dict.fromkeys(sentence for sentence in said if sentence)),
        rows=tuple(_row(before, now, worker) for worker in now["workers"]),
        tokens_per_s=_rate(before, now, was["generated_tokens"], counted["generated_tokens"]),
        running=sum(status.get("running", 0) for status in statuses),
        waiting=sum(status.get("waiting", 0) for status in statuses),
        waiting_tokens=sum(status.get("waiting_tokens", 0) for status in statuses),
        first_token=_latency(was["time_to_first_token"], counted["time_to_first_token"]),
        inter_token=_latency(was["inter_token_latency"], counted["inter_token_latency"]),
        tokens_per_expert_call=(counted["expert_tokens"] - was["expert_tokens"]) / calls if calls > 0 else None,
        window_s=timeline["window_s"] if timeline else None,
        **_of_timeline(timeline) if timeline else {},
    )


def quantile(before: Json, now: Json, share: float) -> float | None:
    """The latency in seconds below which a share of what happened between two states of a histogram lies: straight
    between the buckets' bounds, as Prometheus has it. None where nothing happened."""
    counts = [count - was for was, count in zip(before["counts"], now["counts"], strict=True)]
    if not counts or counts[-1] <= 0:
        return None
    i = next(i for i, count in enumerate(counts) if count >= share * counts[-1])
    low, below = (now["bounds_s"][i - 1], counts[i - 1]) if i else (0.0, 0)
    high = now["bounds_s"][i]
    if high is None:  # above the last bound nothing is known
        return float(low)
    return float(low + (high - low) * (share * counts[-1] - below) / (counts[i] - below))


def _of_timeline(timeline: Json) -> Json:
    return {
        "sides": tuple(Side(role, busy, timeline["bubbles"][role]) for role, busy in timeline["busy"].items()),
        "efficiency": timeline["efficiency"],
        "tokens_per_ffn_call": timeline["tokens_per_ffn_call"],
        "wire_bytes_per_token": timeline["wire_bytes_per_token"],
    }


def _row(before: Json, now: Json, worker: Json) -> Row:
    known = ((now["timeline"] or {}).get("workers")) or []
    busy = next((w["busy"] for w in known if (w["role"], w["rank"]) == (worker["role"], worker["rank"])), None)
    is_attention = worker["role"] == "attention"
    name = f"attention {worker['rank']}" if is_attention else f"FFN {worker['rank']}"
    status = worker["status"]
    if worker["state"] == "lost" or not status:
        return Row(name, worker["state"], None if worker["state"] == "lost" else busy)
    was = next((w["status"] for w in before["workers"] if _same(w, worker)), None) or status
    if not is_attention:
        return Row(name, worker["state"], busy, calls_per_s=_rate(before, now, was["calls"], status["calls"]))
    return Row(
        name,
        worker["state"],
        busy,
        status["running"],
        status["waiting"],
        status["blocks_used"] / status["blocks_total"] if status["blocks_total"] else None,
        _rate(before, now, was["generated_tokens"], status["generated_tokens"]),
    )


def _same(one: Json, other: Json) -> bool:
    return all(one[key] == other[key] for key in ("role", "rank", "pid"))


def _rate(before: Json, now: Json, was: int, count: int) -> float | None:
    seconds = now["at_s"] - before["at_s"]
    return (count - was) / seconds if seconds > 0 else None


def _latency(before: Json, now: Json) -> Latency:
    return Latency(quantile(before, now, 0.5), quantile(before, now, 0.95))
