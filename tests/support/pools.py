"""The pools of Celery's worker, as tests are given them."""

from __future__ import annotations

from typing import Any

import pytest

POOLS = ("prefork", "threads", "solo", "gevent")


def pool_options(pool: str, slots: int = 4) -> tuple[str, ...]:
    """Return the options of a worker with that pool; `solo` has one slot whatever is asked for."""
    return ("-P", "solo") if pool == "solo" else ("-P", pool, "-c", str(slots))


def pools(*always: str, slow: tuple[str, ...] = ()) -> list[Any]:
    """Return parameters of a test: pools that `make test` runs it on, and those that `make test-slow` adds."""
    return [*always, *(pytest.param(pool, marks=pytest.mark.slow) for pool in slow)]
