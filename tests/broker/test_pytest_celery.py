"""The nodes of `celery_sharding.testing` under pytest-celery: a pytest of its own runs pytest-celery's fixtures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(240)

SHOP = """
import os, time
from celery import Celery
from celery_sharding import ShardGroup, Sharding
from celery_sharding.testing import Trace

app = Celery("shop", broker="amqp://nowhere:1//", backend="redis://nowhere:1/0")
Sharding(app, groups=[ShardGroup("orders", shards=4)])
trace = Trace(os.environ["TRACE"])

@app.task(shard_group="orders", shard_key="key")
def step(key, number):
    with trace.run(key, number):
        time.sleep(0.01)
    return number
"""
CONFTEST = """
import pytest

pytest_plugins = ["celery_sharding.testing.pytest_celery"]

@pytest.fixture
def sharding_app():
    return "shop"

@pytest.fixture
def sharding_worker_arguments():
    return [("-c", "2"), ("-c", "1", "-P", "threads")]
"""
TESTS = """
from pytest_celery import CeleryTestSetup
from celery_sharding.testing import check_order
from shop import app, step, trace

def test_everything_is_ready(celery_setup: CeleryTestSetup):
    assert len(celery_setup) == 4
    assert celery_setup.app is app
    assert celery_setup.ready(ping=True, control=True, docker=True)
    answers = celery_setup.app.control.ping(timeout=5)
    names = {worker.hostname() for worker in celery_setup.worker_cluster}
    assert {name for answer in answers for name in answer} == names == {w.name() for w in celery_setup.worker_cluster}
    celery_setup.worker.assert_log_exists("ready")
    assert "started" in celery_setup.broker.logs().lower()
    assert "Ready to accept connections" in celery_setup.backend.logs()

def test_the_order_is_kept_when_nodes_are_killed_and_restarted(celery_setup: CeleryTestSetup):
    first, second = celery_setup.worker_cluster
    published = [(f"k{number % 5}", number) for number in range(150)]
    results = [step.delay(*message) for message in published]
    assert trace.wait_for(20)

    first.kill()
    assert first.container.status == "exited"
    second.kill(signal="SIGTERM")
    assert second.container.status == "exited"
    first.restart()
    second.restart(force=True)
    assert [worker.container.status for worker in celery_setup.worker_cluster] == ["running", "running"]

    celery_setup.broker.restart()
    assert [result.get(timeout=60) for result in results] == [number for _, number in published]
    verdict = check_order(trace, published)
    assert (verdict.lost, verdict.overlapping, verdict.out_of_order) == (0, 0, 0), verdict

    # Left dead for the next test, which finds them running
    celery_setup.broker.kill()
    celery_setup.backend.kill()
    assert [node.container.status for node in (celery_setup.broker, celery_setup.backend)] == ["exited", "exited"]

def test_what_a_test_has_killed_is_there_for_the_next(celery_setup: CeleryTestSetup):
    assert celery_setup.ready()
    assert step.delay("later", 1).get(timeout=30) == 1
"""


def test_pytest_celery_runs_on_nodes_without_a_container_engine(tmp_path: Path) -> None:
    # Given a project with an app, and tests that use pytest-celery's setup
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_shop.py").write_text(TESTS)
    # When pytest runs them, where no container engine answers
    env = os.environ | {"TRACE": str(tmp_path / "trace"), "DOCKER_HOST": "tcp://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    # Then they pass
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
