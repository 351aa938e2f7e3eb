"""`afd plan`'s search: what it finds is feasible, is the best of what it looked at, and is explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from afd.config import load
from afd.errors import ConfigError
from afd.planner.candidates import USABLE, Split, expected_skew
from afd.planner.deployment import as_yaml
from afd.planner.explain import binding_limit, pays, verdict
from afd.planner.hardware import CARDS, Card
from afd.planner.models import MODELS
from afd.planner.search import Ask, Plan, search


def ask(name: str = "step3", attention: str = "H20", ffn: str = "H800", **changes: object) -> Ask:
    plain = Ask(MODELS[name], CARDS[attention], CARDS[ffn], context=8192, tpot_s=0.050, max_workers=8)
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return search(ask())


def test_a_plan_keeps_its_latency_and_its_memory(plan: Plan) -> None:
    how, point, _ = plan.best
    assert isinstance(how, Split)
    assert point.step_s <= 0.050
    times = how.times
    assert times.ffn_memory <= USABLE * CARDS["H800"].memory_bytes
    held = times.attention_memory(point.batch / how.attention, 8192)
    assert held <= USABLE * CARDS["H20"].memory_bytes
    assert how.at(point.batch) == point


def test_the_front_gets_cheaper_or_fuller_as_it_gets_slower_and_holds_the_plan(plan: Plan) -> None:
    points = [found.point for found in plan.front]
    assert len(points) > 5
    assert plan.best in plan.front
    for one in points:
        for other in points:
            beaten = (
                other.step_s <= one.step_s
                and other.usd_per_1m <= one.usd_per_1m
                and other.tokens_per_s_per_card >= one.tokens_per_s_per_card
            )
            assert other is one or not beaten


def test_latency_binds_a_plan_for_a_huge_memory_and_memory_one_for_a_small(plan: Plan) -> None:
    assert plan.best.capped == "latency"
    assert binding_limit(plan).startswith("Latency binds: at ")
    small = replace(CARDS["H20"], memory_bytes=21e9)
    tight = search(replace(ask(tpot_s=1.0), attention=small))
    assert tight.best.capped == "memory"
    assert "fill the 19 usable GB of every H20" in binding_limit(tight)
    assert "The batch asked for binds: 64" in binding_limit(search(ask(batch=64)))


def test_a_longer_time_per_token_and_a_faster_network_never_make_a_plan_dearer(plan: Plan) -> None:
    slower = search(ask(tpot_s=0.100))
    assert slower.best.point.usd_per_1m <= plan.best.point.usd_per_1m
    faster = {name: replace(CARDS[name], net_bandwidth=2 * CARDS[name].net_bandwidth) for name in ("H20", "H800")}
    found = search(replace(ask(), attention=faster["H20"], ffn=faster["H800"]))
    assert found.best.point.usd_per_1m <= plan.best.point.usd_per_1m


def test_afd_pays_for_step3_on_the_reports_cards_as_the_report_says(plan: Plan) -> None:
    assert pays(plan)
    assert verdict(plan)[0].startswith("AFD pays: ")
    assert search(ask(attention="H800", context=4096)).best.point.tokens_per_s_per_card > 2324  # DeepSeek-V3's EP


def test_afd_does_not_pay_for_a_small_batch_of_a_dense_model_and_colocated_is_named() -> None:
    found = search(ask("qwen3-32b", "H800", batch=16))
    assert not pays(found)
    said = " ".join(verdict(found))
    assert "AFD does not pay" in said
    assert "colocated worker" in said
    assert "The model is dense" in said
    assert "The batch is small: " in said


def test_experts_too_sparse_for_the_network_are_named_as_a_reason() -> None:
    assert "sparser than H800's network can feed (0.058)" in " ".join(verdict(search(ask("deepseek-v3", "H800"))))


@pytest.mark.parametrize("net_bandwidth", [2e9, 5e9])
def test_on_a_slow_link_afd_does_not_pay_and_the_dead_zone_is_named(net_bandwidth: float) -> None:
    """5 GB/s a card: 40 Gbit/s, a tenth of what the report's servers have."""
    slow: dict[str, Card] = {n: replace(CARDS[n], net_bandwidth=net_bandwidth) for n in ("H20", "H800")}
    found = search(replace(ask(), attention=slow["H20"], ffn=slow["H800"]))
    assert not pays(found)
    assert "bandwidth dead zone" in " ".join(verdict(found))


@pytest.mark.parametrize(
    ("impossible", "says"),
    [
        (
            ask("deepseek-v3", "L4", "L4", max_workers=2),
            r"FFN weights .* do not fit: over 2 .* nearest .* is 4 workers",
        ),
        (ask(tpot_s=0.001), r"cannot give a token every 1 ms .* nearest is --tpot [\d.]+ms"),
        (ask(batch=10_000_000), r"a batch of 10000000 .* does not fit: 8 attention workers .* nearest is --batch \d+"),
        (ask(attention="L4", context=100_000_000), r"one request .* does not fit .* nearest is --context \d+"),
    ],
    ids=["weights", "latency", "batch", "context"],
)
def test_the_impossible_names_its_limit_and_the_nearest_that_can_be(impossible: Ask, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        search(impossible)


def test_the_nearest_latency_that_an_error_names_can_be_had() -> None:
    with pytest.raises(ConfigError) as error:
        search(ask(tpot_s=0.001))
    nearest = float(str(error.value).rsplit("--tpot ", 1)[1].removesuffix("ms")) / 1e3
    assert search(ask(tpot_s=nearest)).best.point.step_s <= nearest


def test_the_deployment_file_is_one_that_afd_serve_takes(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(as_yaml(plan))
    deployment, how = load(file), plan.best.how
    assert isinstance(how, Split)
    assert deployment.topology == f"{how.attention}A{how.ffn}F"
    assert deployment.ffn.sharding == how.sharding
    assert deployment.attention.microbatches == how.microbatches
    assert deployment.attention.max_running * how.attention >= plan.best.point.batch
    assert deployment.router.prices.attention == pytest.approx(8 * 0.80)


def test_the_busiest_experts_are_nearer_to_an_even_share_the_more_tokens_there_are() -> None:
    skews = [expected_skew(MODELS["step3"], 4, tokens) for tokens in (10, 1000, 100_000)]
    assert skews[0] > skews[1] > skews[2] > 1.0
    assert expected_skew(MODELS["step3"], 1, 10) == 1.0
