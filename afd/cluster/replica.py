"""`afd router`: one router more, in front of workers that an `afd serve` elsewhere keeps. It ends alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

from rich.console import Console

from afd import config
from afd import log as logs
from afd import spec as specs
from afd.cluster import launch
from afd.cluster.roles import Roles, load
from afd.config import Deployment
from afd.errors import ClusterError, ConfigError

RUN = "afd.cluster.ray_join:run"  # loaded by name: Ray is an optional dependency


def serve(file: Path | None, flags: Mapping[str, object], epoch: int | None, roles: Roles = Roles()) -> None:  # noqa: B008
    """Serves until SIGINT or SIGTERM, then drains and returns; the workers go on. `file` and `flags` say how this
    router is to be, all else is as the run of `epoch` (None: the only one) was started.

    Raises ConfigError where `file` says otherwise, ClusterError when there is no Ray cluster or no run on it.
    """
    ours = config.load(file).with_flags(flags)
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ClusterError(
            "a further router finds the workers through the Ray cluster that they run on, and RAY_ADDRESS is not set; "
            "on a Ray that `afd serve` has started for itself, and with cluster.backend local, there is one router"
        )
    with launch.signals() as quitting, launch.optional_ray(RUN)(address, epoch) as (run, theirs, credentials):
        quitting.listen()  # again: Ray has put its own handler in the way
        deployment = joined(theirs, ours, file, flags)
        logs.setup("router", deployment.router.log_format)
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        files = launch.prepared(deployment.model, Console(stderr=True, highlight=False))
        router = load(roles.router)
        spec = specs.from_config(files.config)
        settings = launch.router_settings(router, deployment, files, spec, credentials)
        with closing(router.bind(deployment.router.host, deployment.router.port)) as door:
            on_ready = partial(launch.announce, deployment, files.name)
            server = router.Server(settings, run.view, door, timelines=run.timelines, on_ready=on_ready)
            launch.run_server(server, settings.drain_s, quitting)


def joined(theirs: Deployment, ours: Deployment, file: Path | None, flags: Mapping[str, object]) -> Deployment:
    """The run's deployment with this router's own section; without a file, the section too is the run's, but for the
    flags. Raises ConfigError for a file that is of another deployment."""
    if file is None:
        return theirs.with_flags(flags)
    if ours.transport.bind == "auto":  # which the run has resolved
        ours = ours.with_flags({"transport.bind": theirs.transport.bind})
    for section in (name for name in Deployment.model_fields if name != "router"):
        have, want = getattr(theirs, section), getattr(ours, section)
        if have != want:
            raise ConfigError(f"{file} is not what the workers were started with: {section} is {want}, not {have}")
    return theirs.model_copy(update={"router": ours.router})
