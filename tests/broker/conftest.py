"""What broker tests share beyond the servers: connections, Flower with something to show, virtual hosts."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest
from kombu import Connection

from celery_sharding.layout.cleanup import delete_group
from celery_sharding.testing import FaultProxy
from celery_sharding.topology import Names
from support.flower_server import Show
from support.virtual_hosts import VirtualHost


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    """An open connection to the broker under test."""
    with Connection(broker_url) as opened:
        opened.connect()
        yield opened


@pytest.fixture
def names(group_name: str) -> Names:
    """The names of the group of the test."""
    return Names(group_name)


@pytest.fixture
def connect(broker_url: str) -> Callable[[], Connection]:
    """Makes a connection to the broker under test."""
    return lambda: Connection(broker_url)


@pytest.fixture(scope="module")
def show(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """A group with a worker, for Flower to show; one for all tests of a module."""
    show = Show(f"t{uuid.uuid4().hex[:12]}", broker_url, tmp_path_factory.mktemp("show"))
    show.worker()
    yield show
    show.kill_workers()
    with Connection(broker_url) as connection:
        delete_group(connection, show.group)


@pytest.fixture(scope="module")
def flowers_broker(broker_url: str) -> Iterator[FaultProxy]:
    """What stands between Flower and the broker."""
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def virtual_host(broker_url: str, management_url: str) -> Iterator[VirtualHost]:
    """A virtual host that nobody else uses."""
    host = VirtualHost(broker_url, management_url)
    yield host
    host.remove()
