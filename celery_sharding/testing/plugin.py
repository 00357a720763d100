"""An opt-in pytest plugin: private servers and workers for tests of your own tasks.

In `conftest.py`: `pytest_plugins = ["celery_sharding.testing.plugin"]`. Then tests may ask for

    sharding_broker   a private RabbitMQ for all tests of the run; `.url`, `.restart()`, `.kill()`, `.ctl(…)`
    sharding_redis    a private Redis for all tests of the run
    sharding_proxy    a proxy in front of the broker that cuts, stalls and swallows; one for each test
    sharding_trace    a trace of runs, for `check_order`; one for each test
    sharding_worker   starts workers, which are killed at the end of the test

The servers listen on free ports of 127.0.0.1, keep their data in a temporary folder, and leave nothing behind. They
must be installed; on Debian: apt-get install rabbitmq-server redis-server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from celery_sharding.testing.order import Trace
from celery_sharding.testing.proxy import FaultProxy
from celery_sharding.testing.rabbit_node import RabbitNode
from celery_sharding.testing.redis_node import RedisNode
from celery_sharding.testing.workers import WorkerNode


@pytest.fixture(scope="session")
def sharding_broker() -> Iterator[RabbitNode]:
    with RabbitNode() as node:
        yield node


@pytest.fixture(scope="session")
def sharding_redis() -> Iterator[RedisNode]:
    with RedisNode() as node:
        yield node


@pytest.fixture
def sharding_proxy(sharding_broker: RabbitNode) -> Iterator[FaultProxy]:
    """A proxy in front of `sharding_broker`; give its `url` to workers whose network is to break."""
    with FaultProxy(sharding_broker.url) as proxy:
        yield proxy


@pytest.fixture
def sharding_trace(tmp_path: Path) -> Trace:
    """A trace of the runs of this test."""
    return Trace(tmp_path / "trace")


@pytest.fixture
def sharding_worker(tmp_path: Path) -> Iterator[Callable[..., WorkerNode]]:
    """Start a worker: `sharding_worker("shop", "-c", "4", env={"BROKER_URL": …})`, ready when it returns.

    The first argument is that of `celery -A`, the others are those of `celery worker`.
    """
    nodes: list[WorkerNode] = []

    def start(app: str, *arguments: str, env: Mapping[str, str] | None = None) -> WorkerNode:
        node = WorkerNode(app, f"worker{len(nodes) + 1}@test", arguments, env=env, folder=tmp_path)
        nodes.append(node)
        return node.start()

    yield start
    for node in nodes:
        node.kill()
