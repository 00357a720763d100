"""An opt-in pytest plugin: pytest-celery's clusters on private servers and workers, without a container engine.

In `conftest.py`: `pytest_plugins = ["celery_sharding.testing.pytest_celery"]`, and the fixture `sharding_app`. Then
`celery_setup` and its parts use the servers and workers of this package:

    sharding_app                 override it: the argument of `celery -A`, such as "shop"
    sharding_worker_arguments    override it for more or other workers: the arguments of `celery worker` for each
    celery_broker_cluster        `sharding_broker`, one RabbitMQ for all tests of the run
    celery_backend_cluster       `sharding_redis`, one Redis for all tests of the run
    celery_worker_cluster        workers of `sharding_app`, new for each test
    celery_setup_cls             its app is `sharding_app`, with the URLs of broker and backend

Workers get the URLs in `CELERY_BROKER_URL` and `CELERY_RESULT_BACKEND`, which override the app's settings. Nodes behave
like pytest-celery's: `kill()` takes a signal, `restart()` also starts what was killed. Features of containers, such as
`exec_run`, are missing.
"""

from __future__ import annotations

import importlib
import signal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery import __version__ as celery_version
from celery.app.utils import find_app
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
)

from celery_sharding.testing.rabbit_node import RabbitNode
from celery_sharding.testing.redis_node import RedisNode
from celery_sharding.testing.workers import WorkerNode

pytest_plugins = ["celery_sharding.testing.plugin"]

_PING_TASKS = "pytest_celery.vendors.worker.tasks"
# pytest-celery cuts the id of a container to this length and uses it as a worker's host name.
_ID_LENGTH = 12
_STOP_SECONDS = 60.0


class ServerContainer:
    """The part of a container that pytest-celery uses, for a broker or backend."""

    def __init__(self, node: RabbitNode | RedisNode) -> None:
        self._node = node
        self.name = self.id = node.folder.name

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """Its URL, the same for workers and for the test."""
        return {"url": self._node.url, "host_url": self._node.url}

    @property
    def status(self) -> str:
        return "running" if self._node.answers() else "exited"

    def ready(self) -> bool:
        return self._node.answers()

    def logs(self) -> str:
        return self._node.output

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Kill it, or stop it with SIGTERM."""
        if _signal(signal) == _signal("SIGKILL"):
            self._node.kill()
        else:
            self._node.stop()

    def reload(self) -> None:
        """Do nothing: `status` is always up to date."""

    def restart(self, timeout: float = _STOP_SECONDS) -> None:
        """Restart it on the same address; RabbitMQ keeps its data, Redis does not."""
        self._node.restart()

    def teardown(self) -> None:
        """Start it if a test has left it dead: later tests use it, too."""
        self._node.start()


class WorkerContainer:
    """The part of a container that pytest-celery uses, for a worker."""

    def __init__(self, node: WorkerNode, *, queue: str) -> None:
        self._node = node
        self.name = node.name
        self._worker_name, _, self.id = node.name.partition("@")
        self._queue = queue

    @property
    def status(self) -> str:
        return "running" if self._node.is_running else "exited"

    def ready(self) -> bool:
        self._node.wait_for(" ready.")
        return True

    def logs(self) -> str:
        """Return all it has logged, also before its last start."""
        return self._node.log.read_text(errors="replace")

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Kill it with its pool; send any other signal to its main process, and wait for its end."""
        if _signal(signal) == _signal("SIGKILL"):
            self._node.kill()
        else:
            self._node.signal(_signal(signal))
            self._node.wait(timeout_seconds=_STOP_SECONDS)

    def reload(self) -> None:
        """Do nothing: `status` is always up to date."""

    def restart(self, timeout: float = _STOP_SECONDS) -> None:
        """Stop it warmly if it runs, start it, and return when it is ready."""
        if self._node.is_running:
            self._node.stop(timeout_seconds=timeout)
        self._node.start()

    def teardown(self) -> None:
        self._node.kill()

    def version(self) -> str:
        return str(celery_version)

    def log_level(self) -> str:
        return "INFO"

    def worker_name(self) -> str:
        return self._worker_name

    def worker_queue(self) -> str:
        return self._queue


@pytest.fixture
def sharding_app() -> str:
    """The argument of `celery -A`; to be overridden."""
    pytest.fail("define the fixture `sharding_app`: it returns the app for `celery -A`, such as 'shop'", pytrace=False)


@pytest.fixture
def sharding_worker_arguments() -> Sequence[Sequence[str]]:
    return [("-c", "2")]


@pytest.fixture
def celery_setup_cls(sharding_app: str) -> type[CeleryTestSetup]:
    class ShardingTestSetup(CeleryTestSetup):
        @classmethod
        def create_setup_app(cls, celery_setup_config: Mapping[str, Any], celery_setup_app_name: str) -> Celery:
            app = find_app(sharding_app)
            app.conf.update(celery_setup_config)
            cls.update_app_config(app)
            return app

    return ShardingTestSetup


@pytest.fixture
def celery_broker_cluster(sharding_broker: RabbitNode) -> Iterator[CeleryBrokerCluster]:
    """One broker, which is running again when the test is over."""
    node = CeleryTestBroker(ServerContainer(sharding_broker))
    yield CeleryBrokerCluster(node)
    node.teardown()


@pytest.fixture
def celery_backend_cluster(sharding_redis: RedisNode) -> Iterator[CeleryBackendCluster]:
    """One result backend, which is running again when the test is over."""
    node = CeleryTestBackend(ServerContainer(sharding_redis))
    yield CeleryBackendCluster(node)
    node.teardown()


@pytest.fixture
def celery_worker_cluster(
    sharding_app: str,
    sharding_worker_arguments: Sequence[Sequence[str]],
    celery_setup_app: Celery,
    celery_worker_cluster_config: Mapping[str, Any],
    tmp_path: Path,
) -> Iterator[CeleryWorkerCluster]:
    env = {
        "CELERY_BROKER_URL": ";".join(celery_worker_cluster_config["celery_broker_cluster_config"]["urls"]),
        "CELERY_RESULT_BACKEND": ";".join(celery_worker_cluster_config["celery_backend_cluster_config"]["urls"]),
    }
    importlib.import_module(_PING_TASKS)  # so that the setup's own ping can be sent, too
    nodes = [
        WorkerNode(
            sharding_app,
            f"worker{number}@{uuid.uuid4().hex[:_ID_LENGTH]}",
            [*arguments, "-I", _PING_TASKS],
            env=env,
            folder=tmp_path,
        )
        for number, arguments in enumerate(sharding_worker_arguments, start=1)
    ]
    try:
        for node in nodes:
            node.start(wait_seconds=0)
        for node in nodes:
            node.wait_for(" ready.")
        queue = str(celery_setup_app.conf.task_default_queue)
        yield CeleryWorkerCluster(
            *(CeleryTestWorker(WorkerContainer(node, queue=queue), celery_setup_app) for node in nodes)
        )
    finally:
        for node in nodes:
            node.kill()


def _signal(name: str | int) -> signal.Signals:
    return signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
