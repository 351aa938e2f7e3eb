"""Which tests have the machine to themselves: those that start servers or a Ray, time something, look for what others
may have left, or are quicker with every core."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

ALONE = (
    "tests/system/",
    "tests/contract/test_strangers.py",
    "tests/equivalence/test_bf16_divergence.py",
    "tests/equivalence/test_embedded_model.py",
    "tests/equivalence/test_uneven_workers.py",
    "tests/unit/cluster/",
    "tests/unit/test_cli_bench.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(ALONE):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """A command that sets up the log leaves a handler behind, whose stream closes with the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
