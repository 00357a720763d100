"""The file that says whether a worker lives: fresh, true, and gone with it. Real workers, halted and cut off."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from celery_sharding.testing import FaultProxy, WorkerNode
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)

OLD_SECONDS = 4.0  # a worker that lives writes each second or two


class Heartbeat:
    """The heartbeat file of a worker, as a probe sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = json.dumps({"sharding_heartbeat_file": str(path)})

    def says(self, word: str) -> bool:
        return wait_until(lambda: self.path.exists() and self.path.read_text() == f"{word}\n", timeout_seconds=40)

    def stays_fresh(self) -> bool:
        """See it written three times more."""
        return all(self._is_written() for _ in range(3))

    def grows_old(self) -> bool:
        return wait_until(lambda: time.time() - self.path.stat().st_mtime > OLD_SECONDS, timeout_seconds=20)

    def _is_written(self) -> bool:
        before = self.path.stat().st_mtime_ns
        return wait_until(lambda: self.path.stat().st_mtime_ns != before, timeout_seconds=20)


@pytest.fixture
def heartbeat(tmp_path: Path) -> Heartbeat:
    return Heartbeat(tmp_path / "heartbeat")


@pytest.fixture
def start(shop: Shop, heartbeat: Heartbeat) -> Callable[..., WorkerNode]:
    """Starts a worker with a heartbeat file."""
    return lambda *arguments, **options: shop.worker(*arguments, SHOP_SETTINGS=heartbeat.settings, **options)


def slow(pool: str) -> object:
    return pytest.param(pool, marks=pytest.mark.slow)


@pytest.mark.parametrize("pool", ["prefork", slow("threads"), slow("solo"), slow("gevent")])
def test_the_file_is_fresh_while_the_worker_consumes_old_while_it_is_halted_and_gone_when_it_has_stopped(
    start: Callable[..., WorkerNode], heartbeat: Heartbeat, pool: str
) -> None:
    # Given a worker that consumes
    worker = start(*pool_options(pool, 2))
    assert heartbeat.says("consuming")
    assert heartbeat.stays_fresh()
    # When its main process is halted, then the file grows old, until it goes on
    worker.signal(signal.SIGSTOP)
    assert heartbeat.grows_old()
    worker.signal(signal.SIGCONT)
    assert heartbeat.stays_fresh()
    # And a warm stop removes it, and all that was written beside it
    assert worker.stop() == 0
    assert not list(heartbeat.path.parent.glob("heartbeat*"))


@pytest.mark.parametrize("pool", ["prefork", slow("gevent")])
def test_an_outage_of_the_broker_leaves_the_file_fresh_and_a_main_thread_that_stands_still_does_not(
    shop: Shop, start: Callable[..., WorkerNode], heartbeat: Heartbeat, broker_url: str, pool: str
) -> None:
    with FaultProxy(broker_url) as proxy:
        # Given a worker that is started while the broker is down: it is alive and not ready
        proxy.refuse()
        worker = start(*pool_options(pool, 2), SHOP_BROKER=proxy.url, wait_seconds=0)
        worker.wait_for("Cannot connect")
        assert heartbeat.says("starting")
        assert heartbeat.stays_fresh()
        # When the broker comes and goes, then the worker is ready, and alive meanwhile
        proxy.heal()
        assert heartbeat.says("consuming")
        proxy.refuse()
        assert heartbeat.says("reconnecting")
        assert heartbeat.stays_fresh()
        proxy.heal()
        assert heartbeat.says("consuming")
        # And when its main thread alone stands still, its other threads do not keep the file fresh
        shop.app.control.broadcast("stand_still", destination=[worker.name])
        assert heartbeat.grows_old()


def test_the_file_grows_old_when_a_task_does_not_leave_the_hub_of_greenlets(
    shop: Shop, start: Callable[..., WorkerNode], heartbeat: Heartbeat
) -> None:
    # Given a worker of greenlets
    start(*pool_options("gevent", 2))
    assert heartbeat.says("consuming")
    assert heartbeat.stays_fresh()
    # When a task keeps the hub for itself, then the file grows old
    shop.send("spin", "a", 1)
    assert heartbeat.grows_old()


def test_a_task_that_takes_long_in_a_solo_pool_leaves_the_file_fresh(
    shop: Shop, start: Callable[..., WorkerNode], heartbeat: Heartbeat
) -> None:
    # Given a solo worker, whose main thread runs the tasks
    start(*pool_options("solo", 2))
    assert heartbeat.says("consuming")
    # When a task takes long
    shop.send("step", "a", 1, seconds=60)
    assert shop.trace.wait_for(1, kind="start")
    # Then the file stays fresh meanwhile
    assert heartbeat.stays_fresh()
    assert [mark.kind for mark in shop.trace.read()] == ["start"]


def test_a_worker_whose_file_cannot_be_written_ends_at_once_and_says_why(shop: Shop, tmp_path: Path) -> None:
    # Given a path in a directory that is not there
    settings = json.dumps({"sharding_heartbeat_file": str(tmp_path / "nowhere" / "heartbeat")})
    # When a worker is started
    worker = shop.worker(*pool_options("solo", 2), wait_seconds=0, SHOP_SETTINGS=settings)
    # Then it ends, with one error
    assert worker.wait() != 0
    assert worker.output.count("does not start: sharding_heartbeat_file '") == 1


def test_a_file_that_can_no_longer_be_written_ends_no_worker(
    shop: Shop, start: Callable[..., WorkerNode], heartbeat: Heartbeat
) -> None:
    # Given a worker
    worker = start(*pool_options("threads", 2))
    assert heartbeat.says("consuming")
    # When nothing can be written beside its file any more, as on a full disk
    beside = Path(f"{heartbeat.path}.new")
    assert wait_until(lambda: _make_directory(beside), timeout_seconds=20)
    # Then it says so once, lives on, and is seen to live
    worker.wait_for("the heartbeat file can no longer be written")
    assert heartbeat.stays_fresh()
    shop.send("step", "a", 1)
    assert shop.trace.wait_for(1)
    assert worker.output.count("can no longer be written") == 1
    # And it writes the file when it can
    beside.rmdir()
    worker.wait_for("the heartbeat file is written again")


def _make_directory(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False  # the worker is just writing it
    return True
