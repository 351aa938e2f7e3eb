"""The environment variables this project reads. One list: an unknown AFD_ name or a bad value is an error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from afd import api_keys, credentials
from afd.errors import ConfigError

KNOWN = {
    "AFD_API_KEYS": "keys that clients must send, separated by commas; afd's own commands send the first",
    "AFD_CACHE": "folder for prepared models (default ~/.cache/afd)",
    "AFD_CLUSTER_TOKEN": "what workers and routers show each other, 16 characters or more (default: one for each run)",
    "AFD_KERNELS": "auto: compiled CPU kernels where there is a compiler; native: insist on them; plain: torch only",
    "AFD_LOG": "log level: debug, info, warning or error (default info)",
    "AFD_LOG_FORMAT": "text, or json: one object a line (default text)",
}
SECRET = frozenset({"AFD_API_KEYS", "AFD_CLUSTER_TOKEN"})  # for this process alone: children are given none of them
KERNELS = ("auto", "native", "plain")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True)
class Environment:
    cache: Path
    log_level: str
    kernels: str
    log_format: str = "text"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cluster_token: str = field(default="", repr=False)


def for_children(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a worker's process inherits: everything but the secrets, of which it is told those it needs."""
    return {name: value for name, value in environ.items() if name not in SECRET}


@contextmanager
def without_secrets() -> Iterator[None]:
    """For starting children that inherit this process's environment whatever one does. Not for several threads."""
    taken = {name: os.environ.pop(name) for name in SECRET if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def read(environ: Mapping[str, str] = os.environ) -> Environment:
    """Raises ConfigError for an AFD_ variable that is not in KNOWN, or a value outside its choices."""
    unknown = sorted(k for k in environ if k.startswith("AFD_") and k not in KNOWN)
    if unknown:
        raise ConfigError(f"unknown environment variable {unknown[0]}; known are {', '.join(KNOWN)}")

    def choice(name: str, choices: tuple[str, ...], default: str) -> str:
        value = environ.get(name, default).lower()
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        return value

    keys = environ.get("AFD_API_KEYS")
    token = environ.get("AFD_CLUSTER_TOKEN")
    return Environment(
        cache=Path(environ.get("AFD_CACHE") or "~/.cache/afd").expanduser(),
        log_level=choice("AFD_LOG", LOG_LEVELS, "info"),
        kernels=choice("AFD_KERNELS", KERNELS, "auto"),
        log_format=choice("AFD_LOG_FORMAT", LOG_FORMATS, "text"),
        api_keys=() if keys is None else api_keys.parse(keys.split(","), "AFD_API_KEYS"),
        cluster_token="" if token is None else credentials.parse(token, "AFD_CLUSTER_TOKEN"),
    )
