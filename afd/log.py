"""Logging, set up once per process: time, role and rank, level, message, on standard error."""

from __future__ import annotations

import logging
import sys

from afd import env


def setup(who: str) -> None:
    """Call once at process start; `who` names the process in every line, for example 'attention 0'."""
    logging.basicConfig(
        level=env.read().log_level.upper(),
        format=f"%(asctime)s {who:<12} %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
