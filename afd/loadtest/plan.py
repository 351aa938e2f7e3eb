"""The flags of `afd bench` as a plan: what is sent where and when, and what its figures are held against."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from afd.errors import ConfigError
from afd.loadtest import arrivals, recorded, workload
from afd.loadtest.client import Target
from afd.loadtest.drive import Load
from afd.loadtest.prices import Prices
from afd.loadtest.slo import Slo
from afd.loadtest.window import WarmUp
from afd.loadtest.workload import Ask, Endpoint, Lengths, Writer
from afd.types import DType

CONCURRENCY, REQUESTS, SWEEP_S = 8, 100, 20.0  # where nothing is said
_DTYPES = {"bf16": DType.BF16, "fp8": DType.FP8}


@dataclass(frozen=True, slots=True)
class Options:
    """The flags, by their names; None: not given."""

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    endpoint: str = "completions"
    api_key: str | None = None
    rate: float | None = None
    arrivals: str | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    ramp: str | None = None
    sweep: bool = False
    requests: int | None = None
    duration: float | None = None
    data: str = "random"
    input_tokens: str = "128"
    output_tokens: str | None = None
    prefix_tokens: int = 512
    prefixes: int = 1
    vocab: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    warmup: str = "0"
    slo: str | None = None
    slo_share: float = 0.9
    prices: str | None = None
    cost_dtype: str = "bf16"
    model_path: str | None = None
    timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Checked. `load` and `asks` begin anew at every call, so that a sweep's probes all send the same."""

    options: Options
    target: Target
    warm_up: WarmUp
    slo: Slo | None
    prices: Prices | None
    cost_dtype: DType
    vocab: int = workload.DEFAULT_VOCAB

    def load(self, rate: float | None = None) -> Load:
        """When requests are sent; `rate` in place of the options' own. Raises ConfigError."""
        o = self.options
        rate = o.rate if rate is None else rate
        load = Load(requests=o.requests, seconds=o.duration)
        seed = o.seed + 1  # of the gaps; prompts have their own
        if o.ramp is not None:
            ramp = arrivals.Ramp.parse(o.ramp)
            return replace(load, due_s=arrivals.climbing(ramp, self._kind, o.burstiness, seed))
        if rate is not None:
            return replace(self._bounded(load), due_s=arrivals.steady(rate, self._kind, o.burstiness, seed))
        if o.data.startswith("trace:") and o.concurrency is None:
            return replace(load, due_s=(ask.at_s or 0.0 for ask in self.asks()))
        return replace(self._bounded(load), concurrency=o.concurrency or CONCURRENCY)

    def asks(self) -> Iterator[Ask]:
        """What is sent. Raises ConfigError for data that cannot be read."""
        o = self.options
        kind, _, file = o.data.partition(":")
        writer = Writer(self.target.endpoint, self.vocab)
        inputs = Lengths.parse(o.input_tokens, "--input-tokens")
        outputs = Lengths.parse(o.output_tokens or "128", "--output-tokens")
        if kind == "random" and not file:
            return workload.random_lengths(writer, inputs, outputs, o.seed)
        if kind == "prefix" and not file:
            return workload.shared_prefixes(writer, o.prefix_tokens, o.prefixes, inputs, outputs, o.seed)
        if kind == "sharegpt" and file:
            return recorded.sharegpt(Path(file), outputs if o.output_tokens else None, o.seed)
        if kind == "trace" and file:
            return recorded.trace(Path(file), writer, o.seed)
        raise ConfigError(f"--data is {o.data!r}; it is random, prefix, sharegpt:FILE or trace:FILE.jsonl")

    def describe(self) -> dict[str, str]:
        """What was asked, for people."""
        o = self.options
        if o.sweep:
            load = f"sweep from {self.first_rate:g} requests/s, {self._kind} arrivals"
        elif o.ramp is not None:
            load = f"ramp {o.ramp}, {self._kind} arrivals"
        elif o.rate is not None:
            load = f"{o.rate:g} requests/s, {self._kind} arrivals"
        elif o.data.startswith("trace:") and o.concurrency is None:
            load = "at the trace's times"
        else:
            load = f"{o.concurrency or CONCURRENCY} at a time"
        lengths = f", {o.input_tokens} tokens in, {o.output_tokens or 128} out"
        data = o.data + (lengths if o.data in ("random", "prefix") else "")
        if o.data == "prefix":
            data += f", behind {o.prefixes} prefixes of {o.prefix_tokens}"
        return {
            "model": self.target.model,
            "server": f"{self.target.url} ({self.target.endpoint})",
            "load": load,
            "data": data,
            "seed": str(o.seed),
        }

    @property
    def first_rate(self) -> float:
        """Of a sweep."""
        return self.options.rate or 1.0

    @property
    def _kind(self) -> str:
        o = self.options
        return o.arrivals or ("poisson" if o.burstiness == 1.0 else "gamma")

    def _bounded(self, load: Load) -> Load:
        """An endless load, with an end."""
        if load.requests is not None or load.seconds is not None:
            return load
        return replace(load, seconds=SWEEP_S) if self.options.sweep else replace(load, requests=REQUESTS)


def plan(options: Options) -> Plan:
    """Checks everything that can be before a server is asked. Raises ConfigError naming the flag."""
    o = options
    if o.endpoint not in ("chat", "completions"):
        raise ConfigError(f"--endpoint is {o.endpoint!r}; known are chat, completions")
    ways = [f for f, v in (("--concurrency", o.concurrency), ("--ramp", o.ramp), ("--sweep", o.sweep or None)) if v]
    if o.rate is not None and not o.sweep:
        ways.append("--rate")
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} do not go together; a load arrives in one way")
    if o.arrivals is not None and not (o.sweep or o.ramp or o.rate is not None):
        raise ConfigError(f"--arrivals is {o.arrivals!r}, which is for loads with a rate: --rate, --ramp or --sweep")
    if o.burstiness != 1.0 and o.arrivals not in (None, "gamma"):
        raise ConfigError(f"--burstiness is {o.burstiness:g}, which is for --arrivals gamma, not {o.arrivals}")
    if o.sweep and o.slo is None:
        raise ConfigError("--sweep looks for the highest rate that meets the objectives; say them with --slo")
    if o.cost_dtype not in _DTYPES:
        raise ConfigError(f"--cost-dtype is {o.cost_dtype!r}; known are {', '.join(_DTYPES)}")
    _check_numbers(o)
    url = o.url.rstrip("/").removesuffix("/v1")
    key = o.api_key or os.environ.get("OPENAI_API_KEY", "")
    endpoint = cast(Endpoint, o.endpoint)
    target = Target(url, o.model or "", endpoint, key, o.ignore_eos, o.temperature, o.timeout)
    slo, prices = o.slo and Slo.parse(o.slo), o.prices and Prices.parse(o.prices)
    made = Plan(o, target, WarmUp.parse(o.warmup), slo or None, prices or None, _DTYPES[o.cost_dtype])
    made.load(made.first_rate if o.sweep else None)
    made.asks()
    return made


def _check_numbers(o: Options) -> None:
    for flag, value, least, most in (
        ("--rate", o.rate, 0.0, 1e6),
        ("--concurrency", o.concurrency, 0, 65536),
        ("--requests", o.requests, 0, math.inf),
        ("--duration", o.duration, 0.0, 1e7),
        ("--timeout", o.timeout, 0.0, 1e7),
        ("--slo-share", o.slo_share, 0.0, 1.0),
    ):
        if value is not None and not least < value <= most:
            raise ConfigError(
                f"{flag} is {value:g}; it must be above {least:g}" + f", at most {most:g}" * (most < math.inf)
            )
