"""A plan as the deployment file that `afd serve` takes."""

from __future__ import annotations

import math

import yaml

from afd.config import Deployment, parse
from afd.errors import ConfigError
from afd.planner.candidates import Split
from afd.planner.search import Plan
from afd.types import DType

_MOST_TOKENS = 65536  # attention.max_batch_tokens' limit


def deployment(plan: Plan) -> Deployment:
    """Checked as `afd serve` checks it. Raises ConfigError where the plan is beyond what a deployment may say."""
    ask, (how, point, _) = plan.ask, plan.best
    assert isinstance(how, Split), "a plan splits"
    per_worker = math.ceil(point.batch / how.attention)
    tokens = math.ceil(per_worker / how.microbatches)
    if tokens > _MOST_TOKENS:
        raise ConfigError(
            f"the plan has {tokens} tokens in a microbatch of one worker, and attention.max_batch_tokens goes to "
            f"{_MOST_TOKENS}; ask for a smaller --batch or fewer --cards-per-worker"
        )
    hybrid = how.sharding == "hybrid"
    each = ask.cards_per_worker
    return parse(
        {
            "model": ask.model.name,
            "topology": f"{how.attention}A{how.ffn}F",
            "device": "cuda",
            "attention": {
                "microbatches": how.microbatches,
                "max_batch_tokens": max(512, tokens),
                "max_running": max(1, per_worker),
                "max_context": max(ask.context * 2, 4096),
                "tpot_target_ms": 1e3 * ask.tpot_s,
                "resources": {"num_gpus": float(each)},
            },
            "ffn": {
                "sharding": how.sharding,
                "tp": how.times.shard.tp if hybrid else None,
                "resources": {"num_gpus": float(each)},
            },
            "transport": {"dispatch_dtype": "fp8" if ask.model.precision.weights is DType.FP8 else "auto"},
            "router": {"prices": {"attention": each * ask.attention.usd_per_hour, "ffn": each * ask.ffn.usd_per_hour}},
        },
        "the plan",
    )


def as_yaml(plan: Plan) -> str:
    """With a heading that says what was planned, and only what differs from the defaults."""
    ask, (how, point, _) = plan.ask, plan.best
    changed = deployment(plan).model_dump(mode="json", exclude_defaults=True)
    heading = [
        f"{ask.model.name} at {ask.context} tokens of context, {1e3 * ask.tpot_s:g} ms per token: {how}, a batch of "
        f"{point.batch}.",
        f"Forecast: {1e3 * point.step_s:.1f} ms per token, {point.tokens_per_s:.0f} tokens/s, "
        f"{point.usd_per_1m:.3f} USD "
        "per million tokens.",
        f"A worker is {ask.cards_per_worker} {ask.attention.name} (attention) or {ask.cards_per_worker} {ask.ffn.name} "
        "(FFN). `model` may have to become the path of the checkpoint.",
    ]
    if ask.cards_per_worker > 1:
        heading.append("The workers of this version compute on one card each: --cards-per-worker 1 plans for those.")
    return "".join(f"# {line}\n" for line in heading) + yaml.safe_dump(changed, sort_keys=False)
