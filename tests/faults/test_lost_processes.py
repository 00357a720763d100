"""Processes that are killed, replaced, added and taken away under load: real signals, real memory."""

from __future__ import annotations

import json
import os
import signal

import pytest

from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import is_alive, wait_until
from support.publishers import Load
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)

POOL_SIZE = 4
TASK_SECONDS = 0.05
# How long Celery waits for a result of a process that is gone; 10 s unless told otherwise.
LOST_WAIT = json.dumps({"worker_lost_wait": 1})
# What ended in the last 20 ms before its worker is killed may be repeated, and what ended while it was being killed.
REPEATED_AT_A_KILL = 2 * POOL_SIZE


def pool_processes(worker: WorkerNode) -> list[int]:
    """Return the processes of a prefork pool that live."""
    return [pid for pid in worker.children() if is_alive(pid)]


def pool_shrinks(shop: Shop, worker: WorkerNode) -> bool:
    """Take one process from a pool by remote control; False if the worker did not."""
    replies = shop.app.control.pool_shrink(1, destination=[worker.name], reply=True, timeout=10)
    return any("ok" in reply.get(worker.name, {}) for reply in replies or [])


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was being replaced


def test_the_pool_dies_with_its_killed_parent_and_a_standby_goes_on_in_order(shop: Shop) -> None:
    # Given an owner at work, and a standby
    owner = shop.worker("-c", str(POOL_SIZE))
    shop.worker("-c", str(POOL_SIZE))
    with Load(shop, seconds=TASK_SECONDS) as load:
        load.wait_for_more(20)
        pool = pool_processes(owner)
        # When the owner's main process alone is killed
        os.kill(owner.pid, signal.SIGKILL)
        # Then its pool ends with it, and the standby goes on
        assert wait_until(lambda: not any(map(is_alive, pool)), timeout_seconds=10), pool
        load.wait_for_more(60)
    assert shop.trace.wait_for(load.number), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= REPEATED_AT_A_KILL, verdict


def test_a_killed_owner_of_greenlets_is_replaced_in_order(shop: Shop) -> None:
    # Given an owner at work, and a standby, both with a gevent pool
    pool = ("-c", "8", "-P", "gevent")
    owner = shop.worker(*pool)
    shop.worker(*pool)
    with Load(shop, seconds=TASK_SECONDS) as load:
        load.wait_for_more(20)
        # When the owner is killed
        owner.kill()
        load.wait_for_more(60)
    # Then the standby runs what is left; what was in flight may be repeated, and never beside its first run
    assert shop.trace.wait_for(load.number), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= 2 * 8, verdict


@pytest.mark.parametrize("victims", [1, POOL_SIZE], ids=["one of them", "all of them"])
def test_pool_processes_killed_again_and_again_cost_no_order(shop: Shop, victims: int) -> None:
    # Given a worker under load, in a group where a message may be unlucky often
    worker = shop.worker("-c", str(POOL_SIZE), SHOP_MAX_ATTEMPTS="100", SHOP_SETTINGS=LOST_WAIT)
    rounds = 6
    with Load(shop, seconds=TASK_SECONDS) as load:
        # When pool processes are killed, again and again
        for _ in range(rounds):
            load.wait_for_more(10)
            kill_all(pool_processes(worker)[:victims])
        load.wait_for_more(20)
    # Then all runs, in order; a run that had ended when its process was killed, and had not told, may be repeated
    assert shop.trace.wait_for(load.number), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= rounds * victims, verdict


def test_a_task_that_hits_its_memory_limit_fails_and_its_key_goes_on(shop: Shop) -> None:
    # Given tasks that want more memory than their process may have
    shop.worker("-c", "2")
    results = [shop.send("hungry", key, 1) for key in ("a", "b")]
    for key in ("a", "b"):
        shop.send("step", key, 2)
    # When they run, then each fails once, and its successor runs
    for result in results:
        with pytest.raises(MemoryError):
            result.get(timeout=20)
    assert shop.trace.wait_for(2), shop.trace.read()
    for key in ("a", "b"):
        assert [mark.kind for mark in shop.trace.read() if mark.key == key] == ["begin", "start", "end"]


@pytest.mark.parametrize(
    "option",
    [
        "--max-tasks-per-child=1",
        pytest.param("--max-tasks-per-child=3", marks=pytest.mark.slow),
        pytest.param("--max-memory-per-child=1", marks=pytest.mark.slow),
    ],
)
def test_pool_processes_that_are_replaced_all_the_time_cost_nothing(shop: Shop, option: str) -> None:
    # Given a worker whose pool processes are replaced after a few tasks
    worker = shop.worker("-c", str(POOL_SIZE), option)
    before = set(pool_processes(worker))
    # When it works off a backlog, to which more is added (Celery replaces two or three processes in a second, at most)
    for number in range(24):
        shop.send("step", f"k{number % 6}", number)
        if number == 15:
            assert shop.trace.wait_for(4), shop.verdict()
    # Then nothing is lost, repeated, overlapping or out of order, and no process lived long
    assert shop.trace.wait_for(24), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
    assert not before & set(pool_processes(worker))


def test_a_pool_that_scales_itself_keeps_the_order_and_uses_what_it_gets(shop: Shop) -> None:
    # Given a worker that scales between one process and four
    worker = shop.worker("--autoscale=4,1", AUTOSCALE_KEEPALIVE="1")
    assert len(pool_processes(worker)) == 1
    # When there is more to do than one process can, then nothing for a while, then more again
    for _ in range(2):
        with Load(shop, seconds=TASK_SECONDS) as load:
            load.number = len(shop.published)
            assert wait_until(lambda: len(pool_processes(worker)) == 4, timeout_seconds=30)
            load.wait_for_more(20)
        assert shop.trace.wait_for(load.number), shop.verdict()
        assert wait_until(lambda: len(pool_processes(worker)) == 1, timeout_seconds=30)
    # Then nothing is lost, repeated, overlapping or out of order
    assert shop.verdict().is_clean, shop.verdict()


def test_a_pool_that_is_restarted_grown_and_shrunk_by_remote_control_keeps_the_order(shop: Shop) -> None:
    # Given a worker under load that may restart its pool
    worker = shop.worker("-c", "2", SHOP_SETTINGS=json.dumps({"worker_pool_restarts": True}))
    control = shop.app.control
    before = set(pool_processes(worker))
    with Load(shop, seconds=0.02) as load:
        load.wait_for_more(20)
        # When its pool is grown
        control.pool_grow(3, destination=[worker.name])
        assert wait_until(lambda: len(pool_processes(worker)) == 5, timeout_seconds=20)
        load.wait_for_more(20)
        # And shrunk: Celery refuses while all are busy, and now and then one process more than it says is left
        for _ in range(2):
            assert wait_until(lambda: pool_shrinks(shop, worker), timeout_seconds=20)
        load.wait_for_more(20)
        # And restarted
        control.pool_restart(destination=[worker.name])
        assert wait_until(lambda: not before & set(pool_processes(worker)), timeout_seconds=20)
        load.wait_for_more(20)
    # Then nothing is lost, repeated, overlapping or out of order
    assert shop.trace.wait_for(load.number), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
