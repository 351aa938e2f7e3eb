"""Stage times from peaks: fitted to one measurement of the Step-3 report, they forecast its others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from afd.planner.candidates import Colocated
from afd.planner.hardware import CARDS
from afd.planner.models import MODELS, Precision
from afd.planner.roofline import Efficiency, Roofline, Workers, fit_pace
from afd.planner.stages import Load, pace, step_s
from afd.topology import FfnShard
from afd.types import DType
from tests.unit.planner.report_tables import TABLE_9

SERVER = Workers(CARDS["H800"], 8)


def h800(name: str, ffn: int, kv: DType = DType.FP8) -> Roofline:
    """Workers of 8 H800s, experts spread over the FFN workers, each expert divided over a worker's cards."""
    model = replace(MODELS[name], precision=Precision(kv=kv))
    return Roofline(model, SERVER, SERVER, FfnShard(0, ffn, 1))


def per_card(times: Roofline, load: Load) -> float:
    """Tokens per second and card."""
    return load.batch / step_s(times, load) / (8 * (load.attention + load.ffn))


def fitted() -> Efficiency:
    """To 2A2F at 4K: 4039 tokens per second and card."""
    load = Load(2, 2, 3, 6144, 4096)
    return fit_pace(h800("step3", 2), load, load.batch / (4039 * 32)).efficiency


def test_the_default_pace_is_the_one_that_2a2f_gives() -> None:
    assert fitted().pace == pytest.approx(Efficiency().pace, rel=0.005)


def test_the_default_pace_of_colocated_experts_is_the_one_that_deepseek_v3s_profile_gives() -> None:
    """Table 8, EP (profile): 2324 tokens per second and card at 4K on 128 H800s, attention in BF16, 50 ms a token."""
    model = replace(MODELS["deepseek-v3"], precision=Precision(kv=DType.BF16))
    slowed = Efficiency(pace=Efficiency().colocated_pace)
    times = Roofline(model, SERVER, SERVER, FfnShard(0, 16, 1), slowed)
    requests = round(2324 * 0.050) * 128
    assert Colocated(times, 16, 4096).at(requests).tokens_per_s_per_card == pytest.approx(2324, rel=0.01)


@pytest.mark.parametrize(
    ("name", "kv", "load", "measured"),
    [
        ("step3", DType.BF16, Load(3, 2, 3, 6048, 4096), 3321),  # found: -5 %
        ("step3", DType.FP8, Load(4, 2, 3, 6144, 8192), 2643),  # found: +2 %
        ("step3-600b-upcycled", DType.FP8, Load(3, 4, 3, 3 * 3072, 4096), 3291),  # found: +5 %
    ],
    ids=["3A2F BF16", "4A2F 8K", "3A4F upcycled"],
)
def test_fitted_to_the_2a2f_row_the_other_rows_of_table_8_come_out(
    name: str, kv: DType, load: Load, measured: float
) -> None:
    times = replace(h800(name, load.ffn, kv), efficiency=fitted())
    assert per_card(times, load) == pytest.approx(measured, rel=0.10)


def test_the_wires_are_those_of_section_7() -> None:
    """128 tokens per pair of cards take 18 us out and 37 us back at the full 400 Gbit/s."""
    times = replace(h800("step3", 2), efficiency=Efficiency(network=1.0))
    assert 1e6 * times.dispatch_s(0, 1024) == pytest.approx(18.9, abs=0.5)  # with scales, which the report leaves out
    assert 1e6 * times.combine_s(0, 1024) == pytest.approx(37, abs=0.5)


def attention_us(name: str, card: str, context: int) -> float:
    """Table 9's experiment: 4 cards, 256 requests; Qwen's KV heads and projections are divided over the cards."""
    model = replace(MODELS[name], precision=Precision(kv=DType.BF16))
    split = "all" if name == "qwen3-235b" else "none"
    times = Roofline(model, Workers(CARDS[card], 4), SERVER, FfnShard(0, 1, 1), fitted(), split)
    return 1e6 * times.attention_s(10, 256, 256 * context)


@pytest.mark.parametrize("context", [8192, 32768])
@pytest.mark.parametrize(("column", "card"), list(enumerate(("H800", "H20", "A800"))))
def test_mfa_mla_and_gqa_come_in_table_9s_order_on_every_card(column: int, card: str, context: int) -> None:
    measured = {name: TABLE_9[context, name][column] for name in ("step3", "deepseek-v3", "qwen3-235b")}
    known = {name: us for name, us in measured.items() if us is not None}
    found = {name: attention_us(name, card, context) for name in known}
    assert sorted(found, key=lambda name: found[name]) == sorted(known, key=lambda name: known[name])
    # Errors, H800 / H20 / A800: MFA -0, -7, -11 % at 8K and +17, -8, +4 % at 32K; MLA -15, +20 and -8, +18 %; GQA +14,
    # -19, -5 % and +23, -17, -4 %. The experiment's kernels are not those that table 8's row was fitted to.
    assert found == pytest.approx(known, rel=0.25)


def test_a_pipeline_is_paced_by_its_busiest_side_or_by_the_trip_when_too_little_is_in_flight() -> None:
    times = h800("step3", 2)
    three, one = (pace(times, 30, Load(2, 2, m, 2048 * m, 4096)) for m in (3, 1))
    assert three.binds == "ffn"
    assert three.period == pytest.approx(3 * three.ffn)
    assert one.binds == "trip"
    assert (
        one.period == one.trip == pytest.approx(one.attention + one.dispatch + one.ffn + one.combine + 2 * one.latency)
    )


def test_an_impossible_measurement_is_not_fitted() -> None:
    with pytest.raises(ValueError, match="wires alone"):
        fit_pace(h800("step3", 2), Load(2, 2, 3, 6144, 4096), 1e-4)
