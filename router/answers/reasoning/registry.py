"""The list of reasoning parsers (router.reasoning_parser)."""

from __future__ import annotations

from afd.errors import ConfigError
from router.answers.reasoning.base import Reasoning
from router.answers.reasoning.deepseek_r1 import DEEPSEEK_R1
from router.answers.reasoning.step3 import STEP3

REASONING: dict[str, Reasoning] = {reasoning.name: reasoning for reasoning in (STEP3, DEEPSEEK_R1)}


def find(name: str) -> Reasoning | None:
    """None for "none": everything is the answer. Raises ConfigError listing the names."""
    if name != "none" and name not in REASONING:
        raise ConfigError(f"router.reasoning_parser is {name!r}; known are none, {', '.join(REASONING)}")
    return REASONING.get(name)
