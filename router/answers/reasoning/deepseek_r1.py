"""DeepSeek-R1 and its kin open with the tag, unless the template has done it for them; else they do not think."""

from __future__ import annotations

from router.answers.reasoning.base import Reasoning

DEEPSEEK_R1 = Reasoning("deepseek_r1", assumed=False)
