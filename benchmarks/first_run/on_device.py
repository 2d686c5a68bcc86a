"""A pytest plugin: of kernel tests only those that a GPU can fail.

A first run has no time for tests of plans, of refusals and of the plain-torch references: those hold on any machine.
"""

from __future__ import annotations

import pytest

ELSEWHERE = ("reference", "cpu")
"""Implementations that run no kernel of a GPU."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all others."""
    others = [item for item in items if not touches_the_device(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def touches_the_device(item: pytest.Item) -> bool:
    """Marked gpu, or one that takes the fixture `device`; with no backend from `ELSEWHERE`."""
    chosen = getattr(getattr(item, "callspec", None), "params", {})
    takes = "device" in getattr(item, "fixturenames", ()) and "device" not in chosen  # a parameter is a `Device`
    return (takes or item.get_closest_marker("gpu") is not None) and chosen.get("backend") not in ELSEWHERE
