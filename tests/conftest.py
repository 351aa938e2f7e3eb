"""Which tests have the machine to themselves: those that start servers, and those that time something."""

from __future__ import annotations

import pytest

ALONE = ("tests/system/", "tests/equivalence/test_uneven_workers.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(ALONE):
            item.add_marker(pytest.mark.alone)
