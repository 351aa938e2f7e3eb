"""Whether the commands in deploy/ exist: parsed by the programs they call, and not run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer.main

from afd import cli, config
from tests.recipes import DEPLOY

CHECKOUTS = ("/opt/afd/", "~/afd/", "afd/")  # where manifests have this repository
MOUNTED = {"/etc/afd/afd.yaml": "local.yaml", "/etc/afd/deployment.yaml": "heterogeneous.yaml"}


def check_afd(command: str | list[str]) -> config.Deployment | None:
    """`afd serve FILE ...` with flags that exist, and a deployment that loads; the deployment, or None for another
    subcommand of afd, whose flags then exist."""
    words = shlex.split(command) if isinstance(command, str) else command
    context = _parsed(typer.main.get_command(cli.app), words)
    if context.info_name != "serve":
        return None
    flags = context.params
    named: Path = flags["deployment"]
    overrides = {"cluster.backend": flags["backend"], "router.host": flags["host"], "topology": flags["topology"]}
    return config.load(deployment_file(str(named))).with_flags(overrides)


def check_ray(command: str) -> dict[str, Any]:
    """A `ray ...` command: its subcommand exists, and all its flags; their values."""
    from ray.scripts.scripts import cli as ray

    params: dict[str, Any] = _parsed(ray, shlex.split(command)).params
    return params


def deployment_file(name: str) -> Path:
    """The file in this repository that a manifest means by `name`."""
    if name in MOUNTED:
        return DEPLOY / MOUNTED[name]
    for checkout in CHECKOUTS:
        name = name.removeprefix(checkout)
    found = DEPLOY.parent / name if name.startswith("deploy/") else DEPLOY / name
    assert found.is_file(), f"{name} is not in this repository"
    return found


def _parsed(command: Any, words: list[str]) -> Any:
    """The context of the innermost subcommand, of click or of the click inside typer. Raises UsageError, of either, for
    an option that does not exist."""
    name, *arguments = words
    while subcommands := getattr(command, "commands", None):
        assert arguments, f"{name} needs a command"
        assert arguments[0] in subcommands, f"{name} has no command {arguments[0]!r}"
        command, name, arguments = subcommands[arguments[0]], arguments[0], arguments[1:]
    return command.make_context(name, arguments)
