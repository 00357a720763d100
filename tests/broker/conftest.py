"""What broker tests share beyond the servers: an open connection, and a shop with workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection
from shops import Shop
from virtual_hosts import VirtualHost


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    """An open connection to the broker under test."""
    with Connection(broker_url) as opened:
        opened.connect()
        yield opened


@pytest.fixture
def shop(group_name: str, broker_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A group whose workers and publisher are there to be ill-treated."""
    shop = Shop(group_name, broker_url, tmp_path)
    yield shop
    shop.kill_workers()


@pytest.fixture
def virtual_host(broker_url: str, management_url: str) -> Iterator[VirtualHost]:
    """A virtual host that nobody else uses."""
    host = VirtualHost(broker_url, management_url)
    yield host
    host.remove()
