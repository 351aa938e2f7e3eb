"""Nothing that comes from outside is unpickled, and the linter keeps it so."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("afd", "attention_worker", "ffn_worker", "router")


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle",
        "import marshal",
        "import torch\n\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\n\nnp.load('x')",
        "from multiprocessing.connection import Listener",
        "from multiprocessing.managers import BaseManager",
        "import yaml\n\nyaml.unsafe_load('x')",
    ],
)
def test_the_linter_refuses_what_unpickles(line: str) -> None:
    command = [str(Path(sys.executable).with_name("ruff")), "check", "--no-cache", "--stdin-filename", "afd/rpc/new.py"]
    done = subprocess.run([*command, "-"], input=line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "TID251" in done.stdout, done.stdout


def attributes() -> Iterator[tuple[str, str]]:
    """(file, name) of every attribute and keyword that the packages use: what a linter does not see behind an Any."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute):
                    yield str(file.relative_to(ROOT)), node.attr
                elif isinstance(node, ast.keyword) and node.arg is not None:
                    yield str(file.relative_to(ROOT)), node.arg


def test_no_object_goes_through_torch_distributed_and_no_loader_is_told_to_unpickle() -> None:
    found = list(attributes())
    assert len(found) > 1000
    objects = {
        "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
        "recv_object_list", "allow_pickle", "weights_only", "loads_pickle", "unpickle",
    }  # fmt: skip
    assert [(file, name) for file, name in found if name in objects] == []


def test_only_the_socket_between_a_worker_and_its_parent_carries_pickles() -> None:
    users = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if "multiprocessing" in file.read_text()
    }
    assert users == {"afd/cluster/child.py", "afd/cluster/local.py"}
