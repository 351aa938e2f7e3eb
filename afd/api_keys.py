"""The keys that clients of the router must send. They are never logged, and no error shows one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from afd.errors import ConfigError


def parse(keys: Iterable[str], source: str) -> tuple[str, ...]:
    """The keys, without the space around them; empty ones and comments (#) are skipped.

    Raises ConfigError naming `source` for a key that no header can carry, or when there is none: a server that is told
    of keys must not stand open.
    """
    found = [stripped for key in keys if (stripped := key.strip()) and not stripped.startswith("#")]
    for place, key in enumerate(found, start=1):
        if not all("!" <= char <= "~" for char in key):
            raise ConfigError(f"{source}: key {place} holds a character that is not visible ASCII")
    if not found:
        raise ConfigError(f"{source} holds no API key; leave it out to serve without keys")
    return tuple(dict.fromkeys(found))


def read(file: Path) -> tuple[str, ...]:
    """The keys in `file`, one a line. Raises ConfigError."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the API keys in {file} (router.api_keys_file): {reason}") from error
    return parse(lines, f"{file} (router.api_keys_file)")
