"""Ray, with what it reads from the environment while it is imported. Whoever imports it from here first decides for the
whole process; after another import of it, a Ray of our own would listen beyond loopback.
"""

from __future__ import annotations

import os
import secrets
import sys

__all__ = [
    "ActorDiedError",
    "NodeAffinitySchedulingStrategy",
    "OutOfMemoryError",
    "RayError",
    "get_node_ip_address",
    "list_named_actors",
    "ray",
]

# Ray reads these while it is imported. Its own defaults report usage over the network, colour and merge log lines, give
# actors a lower priority than everything else, and kill them (the controller first) when other programs take memory.
# ruff: noqa: E402
for _name in (
    "RAY_USAGE_STATS_ENABLED",
    "RAY_DEDUP_LOGS",
    "RAY_COLOR_PREFIX",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_worker_niceness",
    "RAY_memory_monitor_refresh_ms",
):
    os.environ.setdefault(_name, "0")
if not os.environ.get("RAY_ADDRESS") and "ray" not in sys.modules:  # a Ray of our own; in its actors Ray is there
    # Despite its name, on every system: at "0" Ray takes 127.0.0.1 for this machine's address, and all its processes
    # listen there alone. (It resolves the argument of ray.init that is meant for this to an outer address.)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # It answers only who has the token, which is in no file: this process and its children hold it.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError
from ray.util import get_node_ip_address, list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
