"""`afd cost`: what a decoded token costs in theory, by the Step-3 report's formulas."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from afd.commands.planned import precision, resolve
from afd.errors import ConfigError
from afd.planner.decode_cost import DecodeCost, decode_cost
from afd.planner.hardware import cards


def cost(model: str, context: int, hardware: str, dtype: str | None, as_json: bool) -> None:
    """Prints it. Raises ConfigError, ModelError."""
    if context < 1:
        raise ConfigError(f"--context is {context}; it must be at least 1 token")
    planned = resolve(model)
    if dtype is not None:
        planned = replace(planned, precision=precision(dtype))
    found = decode_cost(planned, context, cards(hardware))
    if as_json:
        print(json.dumps(found.as_json()))
        return
    _print(found)


def _print(found: DecodeCost) -> None:
    spec, console = found.model.spec, Console(highlight=False)
    console.print(
        f"{found.model.name} at {found.context} tokens of context, per decoded token: "
        f"{found.model.kv_bytes(found.context):.3g} bytes of KV, "
        f"{spec.attention_flops_per_token(found.context):.3g} FLOPs of attention, "
        f"{spec.linear_flops_per_token:.3g} of its projections, {spec.ffn_flops_per_token:.3g} of FFN"
    )
    table = Table(
        "card", "attention", "FFN", "colocated", "attention bound by (FLOP/B)", "ideal FFN batch", "min. sparsity"
    )
    for name, card in found.cards.items():
        roofline = card.roofline(found.model.precision.weights)
        table.add_row(
            name,
            f"{found.attention_usd[name]:.3f}",
            f"{found.ffn_usd[name]:.3f}",
            f"{found.colocated_usd(name):.3f}",
            f"{'computing' if found.intensity > roofline else 'memory'} ({found.intensity:.0f} of {roofline:.0f})",
            f"{found.ideal_ffn_batch(name):.0f}",
            f"{found.minimum_sparsity(name):.3f}" + (" (too sparse)" if _too_sparse(found, name) else ""),
        )
    console.print(table)
    console.print(
        f"USD per million tokens. AFD: attention on {found.attention_card}, FFN on {found.ffn_card}: "
        f"{found.afd_usd:.3f}; colocated: {found.colocated_card}, {found.colocated_usd(found.colocated_card):.3f}."
    )
    if found.model.spec.moe is None:
        console.print("The model is dense: its FFN needs no more tokens together than attention workers have.")
    else:
        console.print(f"Its experts' sparsity is {found.model.sparsity:.3f}: below a card's minimum the network shows.")


def _too_sparse(found: DecodeCost, card: str) -> bool:
    return found.model.spec.moe is not None and found.model.sparsity < found.minimum_sparsity(card)
