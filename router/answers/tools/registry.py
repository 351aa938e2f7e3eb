"""The list of tool formats (router.tool_parser)."""

from __future__ import annotations

from afd.errors import ConfigError
from router.answers.tools.base import ToolFormat
from router.answers.tools.hermes import Hermes
from router.answers.tools.step3 import Step3

FORMATS: dict[str, type[ToolFormat]] = {kind.name: kind for kind in (Hermes, Step3)}


def create(name: str) -> ToolFormat:
    """Raises ConfigError listing the names."""
    if name not in FORMATS:
        raise ConfigError(f"router.tool_parser is {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]()
