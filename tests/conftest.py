"""What every broker and contract test is given: the servers under test, a group of its own, and a shop with workers.

The servers come from the environment (`scripts/with_servers` sets it). Without them a test that asks for one fails: a
skipped broker test would promise what nobody saw.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import signals
from kombu import Connection

from support.groups import pytest_collection_finish
from support.shops import Shop

__all__ = ["pytest_collection_finish"]

# Tests start hundreds of processes. Where Python is told to write no bytecode, each of them compiles the package
# anew, which is most of what it does.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@signals.setup_logging.connect
def _leave_logging_alone(**_: object) -> None:
    """Keep workers that run inside a test from taking pytest's log handlers away from the tests after it."""


def pytest_configure(config: pytest.Config) -> None:
    """Let each process of pytest-xdist have a broker of its own, if there are as many."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    for name in [name for name in os.environ if name.startswith("SHARDING_TEST_") and name.endswith(f"_{number}")]:
        os.environ[name.removesuffix(f"_{number}")] = os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "restart_broker" in getattr(item, "fixturenames", ()):
            item.add_marker("restarts_broker")


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"{name} is not set; run `make test` or `scripts/with_servers pytest …`", pytrace=False)
    return value


@pytest.fixture(scope="session")
def broker_url() -> str:
    """The RabbitMQ under test."""
    return _required("SHARDING_TEST_BROKER_URL")


@pytest.fixture(scope="session")
def management_url() -> str:
    """The management API of the RabbitMQ under test."""
    return _required("SHARDING_TEST_MANAGEMENT_URL")


@pytest.fixture(scope="session")
def redis_url() -> str:
    """The Redis under test; shared, so every test uses keys of its own."""
    return _required("SHARDING_TEST_REDIS_URL")


@pytest.fixture(scope="session")
def rabbitmqctl() -> Callable[..., str]:
    """Run rabbitmqctl on the broker under test and return what it prints."""
    command = shlex.split(_required("SHARDING_TEST_BROKER_CTL"))

    def run(*arguments: str) -> str:
        return subprocess.run([*command, *arguments], check=True, text=True, stdout=subprocess.PIPE).stdout

    return run


@pytest.fixture(scope="session")
def restart_broker() -> Callable[[], None]:
    """Restart the broker under test on its data; returns when it answers again."""
    command = _required("SHARDING_TEST_BROKER_RESTART")

    def restart() -> None:
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)

    return restart


@pytest.fixture
def group_name(broker_url: str) -> Iterator[str]:
    """A group that nobody used before; what the test declares of it is deleted afterwards."""
    from celery_sharding.layout.cleanup import delete_group

    name = f"t{uuid.uuid4().hex[:12]}"
    yield name
    with Connection(broker_url) as connection:
        delete_group(connection, name)


@pytest.fixture
def shop(group_name: str, broker_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A group whose workers and publisher are there to be ill-treated."""
    with Shop(group_name, broker_url, tmp_path) as shop:
        yield shop
