"""Tests of one group (`pytest.mark.xdist_group`) run in one process of pytest-xdist, under any version of pytest."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection_finish(session: pytest.Session) -> Generator[None]:
    """Let pytest-xdist tell the process that divides the tests which group each belongs to, as TEST@GROUP.

    pytest-xdist 3.8 writes that into `Node._nodeid`, which pytest 9.2 does not have any more. Without it each process
    runs some tests of each group, and starts the servers of all.
    """
    items = session.items
    if getattr(session.config.option, "loadgroup", False):
        session.items = [SimpleNamespace(nodeid=_name_with_group(item)) for item in items]  # type: ignore[misc]
    try:
        return (yield)
    finally:
        session.items = items


def _name_with_group(item: pytest.Item) -> str:
    groups = sorted({mark.args[0] for mark in item.iter_markers("xdist_group")})
    suffix = f"@{'_'.join(groups)}"
    return item.nodeid if not groups or item.nodeid.endswith(suffix) else item.nodeid + suffix
