"""`afd hardware`: the cards that the planner knows, and this machine as one more."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from afd.errors import ConfigError
from afd.planner.hardware import CARDS, Card, write_card
from afd.types import DType

_TIMEOUT_S = 120.0


def list_known() -> None:
    """Prints every card with its figures, and their sources. Roofline: FLOPs per byte in FP8; network: each way."""
    table = Table("card", "USD/h", "BF16", "FP8", "memory", "GB", "roofline", "network")
    for card in CARDS.values():
        table.add_row(
            card.name,
            f"{card.usd_per_hour:.2f}",
            f"{card.bf16_flops / 1e12:.0f}T",
            f"{card.fp8_flops / 1e12:.0f}T" if card.fp8_flops else "",
            f"{card.memory_bandwidth / 1e12:.2f}T/s",
            f"{card.memory_bytes / 1e9:.0f}",
            f"{card.roofline(DType.FP8):.0f}",
            f"{card.net_bandwidth / 1e9:.1f}G/s",
        )
    console = Console(highlight=False)
    console.print(table)
    for source in dict.fromkeys(card.source for card in CARDS.values()):
        console.print(f"{', '.join(card.name for card in CARDS.values() if card.source == source)}: {source}")


def measure(output: Path, usd_per_hour: float, name: str | None) -> None:
    """Measures this machine in a process of its own, and writes it as a card. Raises ConfigError."""
    if usd_per_hour <= 0:
        raise ConfigError(f"--usd-per-hour is {usd_per_hour:g}; it must be above 0")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "afd.machine"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"this machine could not be measured within {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"this machine could not be measured: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    machine = Card(
        name or platform.node() or "here",
        usd_per_hour,
        max(found["bf16_flops"], found["fp32_flops"]),
        None,
        found["read_bytes_per_s"],
        found["memory_bytes"],
        found["copy_bytes_per_s"],
        cards_per_server=1,
        source=f"measured: {found['device']}, {platform.platform()}; network: a copy through memory",
    )
    write_card(machine, output)
    print(
        f"{machine.name}: reads {machine.memory_bandwidth / 1e9:.1f} GB/s, copies "
        f"{machine.net_bandwidth / 1e9:.1f} GB/s, computes "
        f"{found['bf16_flops'] / 1e9:.0f} GFLOP/s in bf16 and {found['fp32_flops'] / 1e9:.0f} in fp32; "
        f"written to {output} (use it as --hardware {output})"
    )
