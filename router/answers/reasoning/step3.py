"""Step-3 thinks before every answer, and only closes: its template, or its habit, leaves the opening tag out."""

from __future__ import annotations

from router.answers.reasoning.base import Reasoning

STEP3 = Reasoning("step3", assumed=True)
