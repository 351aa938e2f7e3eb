"""Every cell of the Step-3 report's cost tables comes out of the planner: within 0.5 % or half of the last digit."""

from __future__ import annotations

import pytest

from afd.planner.cost import attention_usd, ffn_usd, ideal_ffn_batch, minimum_sparsity
from afd.planner.decode_cost import decode_cost
from afd.planner.hardware import CARDS, REPORT
from afd.planner.models import MODELS
from afd.types import DType
from tests.unit.planner import report_tables as report

REPORTS_CARDS = [CARDS[name] for name in REPORT]


def near(printed: float, unit: float) -> object:
    """Half of the last printed digit, `unit`, or 0.5 %: whichever is wider."""
    return pytest.approx(printed, rel=0.005, abs=unit / 2)


@pytest.mark.parametrize(("context", "table"), [(8192, report.TABLE_2_8K), (32768, report.TABLE_3_32K)])
@pytest.mark.parametrize("name", report.TABLE_2_8K)
def test_bytes_and_flops_are_those_of_tables_2_and_3(
    name: str, context: int, table: dict[str, tuple[float, ...]]
) -> None:
    model = MODELS[name]
    found = (
        model.kv_bytes(context),
        model.spec.attention_flops_per_token(context),
        model.spec.linear_flops_per_token,
        model.spec.ffn_flops_per_token,
    )
    assert found == pytest.approx(table[name], rel=0.005)


@pytest.mark.parametrize("card", report.TABLE_5)
def test_unit_costs_are_those_of_table_5(card: str) -> None:
    found = CARDS[card].usd_per_flop(DType.FP8), CARDS[card].usd_per_byte
    assert found == pytest.approx(report.TABLE_5[card], rel=0.005)


@pytest.mark.parametrize("name", report.TABLE_6)
def test_costs_are_those_of_table_6(name: str) -> None:
    model, (at_8k, at_32k, ffn) = MODELS[name], report.TABLE_6[name]
    for column, card in enumerate(REPORTS_CARDS):
        assert 1e6 * attention_usd(model, card, 8192) == near(at_8k[column], 0.001), card.name
        assert 1e6 * attention_usd(model, card, 32768) == near(at_32k[column], 0.001), card.name
        assert 1e6 * ffn_usd(model, card) == near(ffn[column], 0.001), card.name


@pytest.mark.parametrize("card", report.TABLE_7)
def test_minimum_sparsities_are_those_of_table_7(card: str) -> None:
    assert minimum_sparsity(MODELS["step3"], CARDS[card]) == near(report.TABLE_7[card], 0.001)


@pytest.mark.parametrize(("name", "context"), report.SECTION_4_2)
def test_the_best_costs_are_those_of_section_4_2_to_the_printed_digit(name: str, context: int) -> None:
    best = decode_cost(MODELS[name], context, REPORTS_CARDS)
    assert round(best.afd_usd, 3) == report.SECTION_4_2[name, context]
    # The report calls DeepSeek-V3's "EP, H800": for it the best card for either half is the same one.
    if name == "deepseek-v3":
        assert (best.attention_card, best.ffn_card, best.colocated_card) == ("H800", "H800", "H800")
    else:
        assert (best.attention_card, best.ffn_card) == ("H20", "H800")
        assert best.colocated_usd(best.colocated_card) > best.afd_usd


def test_intensities_and_rooflines_are_those_of_section_5_1_and_table_4() -> None:
    for name, intensity in (("step3", 128), ("deepseek-v3", 512), ("qwen3-235b", 32)):
        assert decode_cost(MODELS[name], 8192, REPORTS_CARDS).intensity == pytest.approx(intensity, rel=0.002)
    rooflines = [round(card.roofline(DType.FP8)) for card in REPORTS_CARDS]
    assert rooflines == [591, 74, 156, 175]


def test_sparser_experts_need_larger_batches() -> None:
    h800 = CARDS["H800"]
    assert MODELS["deepseek-v3"].sparsity == 9 / 256
    assert MODELS["step3"].sparsity == pytest.approx(0.08, abs=0.004)  # section 5.4: "around 0.08"
    assert ideal_ffn_batch(MODELS["qwen3-32b"], h800) == pytest.approx(591 / 2, rel=0.001)
    assert ideal_ffn_batch(MODELS["deepseek-v3"], h800) == pytest.approx(591 / 2 * 256 / 9, rel=0.001)


def test_section_6_says_what_l20s_and_l4s_can_do_within_a_stage() -> None:
    """272 us a stage: 235 MB of memory traffic on an L20, of which 67 MB are the projections' (the output's over 8)."""
    stage_s, spec, l20, l4 = 272e-6, MODELS["step3"].spec, CARDS["L20"], CARDS["L4"]
    linear = spec.layer_projection_parameters(4) - spec.attention.output_parameters(spec.hidden) * 7 / 8
    assert linear == pytest.approx(67e6, rel=0.01)
    budget = l20.memory_bandwidth * stage_s - linear
    assert budget == pytest.approx(168e6, rel=0.005)
    tokens = budget / spec.layer_kv_bytes(4, 1, DType.FP8)
    assert tokens == pytest.approx(328_000, rel=0.005)
    assert int(tokens / 8000) == 41
    assert linear / (l4.memory_bandwidth * stage_s) > 0.8  # "most of the timeframe just to access the linear part"
    # The FFN reads at half of the bandwidth: 300 GB over 61 layers take 48 L20s (six servers), or 144 L4s.
    per_l20 = l20.memory_bandwidth * 0.5 * stage_s * 61
    assert per_l20 == pytest.approx(7.1e9, rel=0.01)
    servers = -(-300e9 // (8 * per_l20))
    assert servers * 8 == 48
    # "only one third of L20('s bandwidth). It means we need 144 cards": three times 48, the ratio being 2.9.
    assert 48 * round(l20.memory_bandwidth / l4.memory_bandwidth) == 144
