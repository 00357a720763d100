"""A claim store that can be taken away, and a shop whose tasks need it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_sharding.testing.redis_node import RedisNode
from support.shops import Shop


@pytest.fixture
def store() -> Iterator[RedisNode]:
    with RedisNode(keeps_data=True) as node:
        yield node


@pytest.fixture
def shop(group_name: str, broker_url: str, store: RedisNode, tmp_path: Path) -> Iterator[Shop]:
    # Its publisher keeps results elsewhere: Celery asks for them in the backend when it sends.
    with Shop(group_name, broker_url, tmp_path, app="payments") as shop:
        shop.env["SHOP_BACKEND"] = store.url
        # Results would be stored in the same place, for which Celery keeps a slot up to two minutes.
        shop.env["SHOP_SETTINGS"] = '{"task_ignore_result": true}'
        yield shop
