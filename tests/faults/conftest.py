"""What the fault tests share: a shop whose workers and publisher are there to be ill-treated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.shops import Shop


@pytest.fixture
def shop(group_name: str, broker_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A group whose workers and publisher are there to be ill-treated."""
    shop = Shop(group_name, broker_url, tmp_path)
    yield shop
    shop.kill_workers()
