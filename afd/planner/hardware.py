"""Accelerators: what an hour of one costs, and what it does in a second.

The report's four are its table 4 (arXiv 2507.19427: public cloud prices, dense peak rates; networks of section 5.4).
Prices of the others are one cloud's on-demand list, so that they can be compared with one another; the report's are
Chinese clouds', and lower. An estimated price says what it was estimated from, as the report does for the 910B.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from afd.errors import ConfigError
from afd.types import DType


@dataclass(frozen=True, slots=True)
class Card:
    """Rates are peaks, without sparsity. fp8_flops None: it computes FP8 (and INT8) at its BF16 rate. net_bandwidth: of
    one card's share of its server's network, each way."""

    name: str
    usd_per_hour: float
    bf16_flops: float  # per second
    fp8_flops: float | None
    memory_bandwidth: float  # bytes per second
    memory_bytes: float = 80e9
    net_bandwidth: float = 50e9  # bytes per second
    cards_per_server: int = 8
    source: str = ""

    def flops(self, dtype: DType) -> float:
        """FLOP/s in `dtype` (16 bits where it is wider)."""
        return (self.fp8_flops if dtype is DType.FP8 else None) or self.bf16_flops

    def usd_per_flop(self, dtype: DType) -> float:
        return self.usd_per_hour / 3600 / self.flops(dtype)

    @property
    def usd_per_byte(self) -> float:
        """Of memory read."""
        return self.usd_per_hour / 3600 / self.memory_bandwidth

    def roofline(self, dtype: DType) -> float:
        """FLOPs per byte of memory at which both are used up together (table 4's last column, in FP8)."""
        return self.flops(dtype) / self.memory_bandwidth

    @property
    def server_net_bandwidth(self) -> float:
        """Bytes per second, each way; the report's `Net`."""
        return self.net_bandwidth * self.cards_per_server


_GBIT = 1e9 / 8
_TABLE_4 = "Step-3 report, table 4 and section 5.4"
_LIST = "data sheet; price: CoreWeave's on-demand list, February 2026, per card of a whole node"
_G400, _G200 = 400 * _GBIT, 200 * _GBIT
_BY_L40S = "price: from L40S's, by FLOPs"
_MI300X = "AMD MI300X data sheet; price: H100's, whose rates are nearest"
_910C = "public figures of CloudMatrix384; price: from 910B's, by FLOPs"

CARDS = {
    card.name: card
    for card in (
        Card("H800", 2.00, 989e12, 1980e12, 3.35e12, 80e9, _G400, 8, _TABLE_4),
        Card("H20", 0.80, 148e12, 296e12, 4.0e12, 96e9, _G400, 8, _TABLE_4),
        Card("A800", 0.75, 312e12, None, 2.0e12, 80e9, _G200, 8, _TABLE_4),
        Card("910B", 0.67, 280e12, None, 1.6e12, 64e9, _G200, 8, f"{_TABLE_4}; price: from A800's, by FLOPs"),
        Card("H100", 49.24 / 8, 989e12, 1979e12, 3.35e12, 80e9, _G400, 8, f"NVIDIA H100 SXM {_LIST}"),
        Card("H200", 50.44 / 8, 989e12, 1979e12, 4.8e12, 141e9, _G400, 8, f"NVIDIA H200 SXM {_LIST}"),
        Card("B200", 68.80 / 8, 2250e12, 4500e12, 8.0e12, 180e9, _G400, 8, f"NVIDIA HGX B200 {_LIST}"),
        Card("GB200", 42.00 / 4, 2500e12, 5000e12, 8.0e12, 186e9, _G400, 4, f"NVIDIA GB200 NVL72 {_LIST}"),
        Card("A100", 21.60 / 8, 312e12, None, 2.04e12, 80e9, _G200, 8, f"NVIDIA A100 80GB SXM {_LIST}"),
        Card("MI300X", 49.24 / 8, 1307e12, 2615e12, 5.3e12, 192e9, _G400, 8, _MI300X),
        Card("L40S", 18.00 / 8, 362e12, 733e12, 0.864e12, 48e9, _G200, 8, f"NVIDIA L40S {_LIST}"),
        Card("L20", 0.74, 119.5e12, 239e12, 0.864e12, 48e9, 100 * _GBIT, 8, f"NVIDIA data sheet; {_BY_L40S}"),
        Card("L4", 0.75, 121e12, 242e12, 0.300e12, 24e9, 50 * _GBIT, 8, f"NVIDIA data sheet; {_BY_L40S}"),
        Card("910C", 1.87, 780e12, None, 3.2e12, 128e9, _G400, 8, _910C),
    )
}  # fmt: skip
REPORT = ("H800", "H20", "A800", "910B")  # the cards of the report's tables


def card(name: str) -> Card:
    """By its name, whatever its case, or from the file of `afd hardware measure`. Raises ConfigError."""
    if name.endswith(".json"):
        return read_card(Path(name))
    for known in CARDS.values():
        if known.name.lower() == name.strip().lower():
            return known
    raise ConfigError(f"unknown card {name!r}; known are {', '.join(CARDS)}, and the file of `afd hardware measure`")


def cards(text: str) -> list[Card]:
    """Names separated by commas, or `all`. Raises ConfigError for one that is unknown, or there twice."""
    found = list(CARDS.values()) if text.strip().lower() == "all" else [card(name) for name in text.split(",")]
    given = [c.name for c in found]
    if twice := {name for name in given if given.count(name) > 1}:
        raise ConfigError(f"--hardware {text!r} names {min(twice)} twice")
    return found


def read_card(path: Path) -> Card:
    """A measured machine's file. Raises ConfigError naming the file and what is wrong with it."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the hardware file {path}: {error}") from error
    needed = {"name", "usd_per_hour", "bf16_flops", "fp8_flops", "memory_bandwidth", "memory_bytes", "net_bandwidth"}
    if not isinstance(fields, dict) or not needed <= fields.keys():
        lacking = sorted(needed - fields.keys()) if isinstance(fields, dict) else sorted(needed)
        raise ConfigError(
            f"{path} is no hardware file: it lacks {', '.join(lacking)}; `afd hardware measure` writes one"
        )
    for key in needed - {"name", "fp8_flops"}:
        if isinstance(fields[key], bool) or not isinstance(fields[key], (int, float)) or not fields[key] > 0:
            raise ConfigError(f"{path} has {key} = {fields[key]!r}, which is not a number above 0")
    if unknown := fields.keys() - {field.name for field in dataclasses.fields(Card)}:
        raise ConfigError(f"{path} has an unknown key {min(unknown)}")
    return Card(**fields)


def write_card(machine: Card, path: Path) -> None:
    """Raises ConfigError where it cannot be written."""
    try:
        path.write_text(json.dumps(dataclasses.asdict(machine), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the hardware file {path}: {error.strerror}") from error
