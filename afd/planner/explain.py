"""A plan in sentences: what binds it, and whether splitting pays at all."""

from __future__ import annotations

from afd.planner.candidates import USABLE, Colocated, Split
from afd.planner.cost import ideal_ffn_batch, minimum_sparsity
from afd.planner.search import Found, Plan

_MUCH = 0.4  # of a trip for wires, where splitting does not pay; in the report's three stages they have a third

_BINDS = {
    "attention": "the attention workers' compute and memory traffic: more attention workers would raise it",
    "ffn": "the FFN workers' compute and memory traffic: more FFN workers would raise it",
    "dispatch": "the wires from attention to FFN: fewer FFN workers or a faster network would raise it",
    "combine": "the wires from FFN to attention: fewer FFN workers or a faster network would raise it",
    "trip": "a microbatch's own trip through attention, wires and FFN: more microbatches or faster stages would",
}


def binding_limit(plan: Plan) -> str:
    """What keeps the plan from giving more tokens, in a sentence."""
    ask, (_, point, capped) = plan.ask, plan.best
    if capped == "memory":
        usable = USABLE * ask.attention.memory_bytes / 1e9
        return (
            f"Memory binds: {point.batch} requests of {ask.context} tokens fill the {usable:.0f} usable GB of every "
            f"{ask.attention.name}, and a step takes {1e3 * point.step_s:.1f} of {1e3 * ask.tpot_s:g} ms."
        )
    if capped == "batch":
        return (
            f"The batch asked for binds: {point.batch} requests leave a step at {1e3 * point.step_s:.1f} of "
            f"{1e3 * ask.tpot_s:g} ms; most of it is {_BINDS[point.binds].split(':')[0]}."
        )
    return (
        f"Latency binds: at {point.batch} requests a step takes {1e3 * point.step_s:.1f} of {1e3 * ask.tpot_s:g} ms, "
        f"paced by {_BINDS[point.binds]}."
    )


def pays(plan: Plan) -> bool:
    """Whether splitting is cheaper than the cheapest colocated deployment."""
    return plan.colocated is None or plan.best.point.usd_per_1m < plan.colocated.point.usd_per_1m


def verdict(plan: Plan) -> list[str]:
    """Whether AFD pays, and what colocated gives; then every reason against it that applies."""
    best, other = plan.best.point, plan.colocated
    if other is None:
        lines = ["AFD pays: colocated, neither card does it within these limits."]
    else:
        assert isinstance(other.how, Colocated), "a colocated deployment does not split"
        sign = "pays" if pays(plan) else "does not pay"
        pace = ", at the pace that the report measured of DeepSeek-V3's" if other.how.exchanges_experts else ""
        lines = [
            f"AFD {sign}: {best.usd_per_1m:.3g} USD per million tokens and {best.tokens_per_s_per_card:.0f} tokens/s a "
            f"card, against {other.point.usd_per_1m:.3g} and {other.point.tokens_per_s_per_card:.0f} of "
            f"{other.how}{pace}."
        ]
    tuned = plan.colocated_tuned
    if tuned is not None and tuned != other:
        lines.append(
            f"Colocated, were its kernels and wires as well used as AFD's: {tuned.point.usd_per_1m:.3g} USD and "
            f"{tuned.point.tokens_per_s_per_card:.0f} tokens/s a card ({tuned.how})."
        )
    return [*lines, *_reasons(plan)]


def _reasons(plan: Plan) -> list[str]:
    ask, (how, point, _) = plan.ask, plan.best
    assert isinstance(how, Split), "a plan splits"
    model, card, lines = ask.model, ask.ffn, []
    if model.spec.moe is None and not pays(plan):
        lines.append(
            "The model is dense: its FFN is busy at one attention worker's batch, and gains little by joining."
        )
    least = minimum_sparsity(model, card, ask.tpot_s)
    if model.spec.moe is not None and model.sparsity < least:
        lines.append(
            f"Its experts (sparsity {model.sparsity:.3f}) are sparser than {card.name}'s network can feed "
            f"({least:.3f}): "
            "the FFN cannot get the batch that it computes well at."
        )
    together, ideal = point.batch / how.microbatches, ideal_ffn_batch(model, card)
    if together < ideal:
        lines.append(
            f"The batch is small: {together:.0f} tokens meet at the FFN, where {ideal:.0f} would keep a {card.name} "
            "computing rather than reading weights."
        )
    if point.binds in ("dispatch", "combine") or (not pays(plan) and point.wires > _MUCH):
        lines.append(
            f"The link is slow ({100 * point.wires:.0f} % of a microbatch's trip is wires), and this is the bandwidth "
            "dead zone: every FFN worker more needs every token too, so that more of them only lengthen the wires."
        )
    return lines


def row(found: Found) -> tuple[str, ...]:
    """Of the table of the front."""
    point = found.point
    return (
        str(found.how),
        f"{point.batch}",
        f"{1e3 * point.step_s:.1f}",
        f"{point.tokens_per_s_per_card:.0f}",
        f"{point.usd_per_1m:.3g}",
        point.binds,
    )
