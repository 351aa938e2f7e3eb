"""Cards by name and by file, and what measuring writes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from afd.errors import ConfigError
from afd.planner.hardware import CARDS, REPORT, card, cards, read_card, write_card


def test_every_card_says_where_its_figures_are_from() -> None:
    assert set(REPORT) <= CARDS.keys()
    for known in CARDS.values():
        assert known.source
        assert known.usd_per_hour > 0
        assert known.bf16_flops <= (known.fp8_flops or known.bf16_flops)
        assert 10 < known.bf16_flops / known.memory_bandwidth < 1000  # a slip of a unit would show


def test_names_are_found_in_any_case_and_unknown_ones_answered_with_the_choices() -> None:
    assert [c.name for c in cards("h800, H20")] == ["H800", "H20"]
    assert cards("all") == list(CARDS.values())
    with pytest.raises(ConfigError, match="unknown card 'H9'; known are H800"):
        card("H9")
    with pytest.raises(ConfigError, match="names H20 twice"):
        cards("H20,h20")


def test_a_written_card_is_read_again(tmp_path: Path) -> None:
    write_card(CARDS["L20"], tmp_path / "l20.json")
    assert card(str(tmp_path / "l20.json")) == CARDS["L20"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory_bandwidth": 0}, "memory_bandwidth = 0, which is not a number above 0"),
        ({"usd_per_hour": "cheap"}, "usd_per_hour = 'cheap'"),
        ({"bf16_flops": True}, "bf16_flops = True"),
        ({"surprise": 1}, "an unknown key surprise"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    file.write_text(json.dumps(asdict(CARDS["H20"]) | changes))
    with pytest.raises(ConfigError, match=says):
        read_card(file)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="lacks bf16_flops"):
        read_card(file)
