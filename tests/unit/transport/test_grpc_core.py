"""The environment in which gRPC's C core is loaded, and the one that child processes inherit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc._cython.cygrpc":
            print("loaded with", os.environ.get("GRPC_EXPERIMENTS"))

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
print("left with", os.environ.get("GRPC_EXPERIMENTS"))
"""
OURS = "-event_engine_client,-event_engine_listener"


def loading(module: str, **environment: str) -> list[str]:
    """What a fresh process that imports `module` says."""
    inherited = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    command = [sys.executable, "-c", SCRIPT, module]
    done = subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("actor", ["attention_worker.actor", "ffn_worker.actor"])
def test_workers_load_grpc_with_their_polling_and_hand_nothing_on(actor: str) -> None:
    assert loading(actor) == [f"loaded with {OURS}", "left with None"]


def test_a_users_own_choice_is_kept() -> None:
    chosen = "-event_engine_dns"
    told = loading("afd.transport.grpc_stream", GRPC_EXPERIMENTS=chosen)
    assert told == [f"loaded with {chosen}", f"left with {chosen}"]
