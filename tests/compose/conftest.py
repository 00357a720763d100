"""The engine and the images of the compose tests; `make test-compose` runs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.compose.engine import build_shop, build_stand_ins, find_missing, run_docker


@pytest.fixture(scope="session")
def images() -> Iterator[None]:
    """All images that the tests need; stand-ins are removed afterwards, lest somebody takes them for the real ones."""
    missing = find_missing()
    if missing:
        pytest.exit(f"make test-compose: {missing}", returncode=1)
    built = build_stand_ins()
    build_shop()
    yield
    for name in built:
        run_docker("image", "rm", name)
