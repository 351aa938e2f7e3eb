"""The commands of deploy/README.md, as a reader would take them from the page."""

from __future__ import annotations

import re
from pathlib import Path

DEPLOY = Path(__file__).parents[1] / "deploy"


def recipe(heading: str) -> list[str]:
    """The bash blocks below `## heading`, in their order."""
    page = (DEPLOY / "README.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    blocks = re.findall(r"^```bash\n(.*?)^```", sections[heading], re.MULTILINE | re.DOTALL)
    assert blocks, f"deploy/README.md has no commands below {heading!r}"
    return blocks
