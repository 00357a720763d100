"""What the library reads of Celery's prefork pool: a new version that changes it must be noticed here."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
from celery.concurrency.asynpool import AsynPool
from kombu.asynchronous import Hub

from celery_sharding.celery_hooks.prefork import DirectWriter, PreforkPool, listen_anew
from celery_sharding.testing.processes import is_alive


class CeleryPool:
    """The part of `celery.concurrency.prefork.TaskPool` that holds the pool itself."""

    def __init__(self, inner: AsynPool) -> None:
        self._pool = inner


def test_runs_in_the_buffer_of_the_pool_reach_a_child_without_the_event_loop():
    hub, results = Hub(), []
    pool = AsynPool(processes=1, threads=False)

    def await_results(count: int) -> None:
        loop = hub.create_loop()
        for _ in range(1_000):
            if len(results) == count:
                return
            next(loop)

    try:
        # Given a pool whose child is up, and a run that waits in the pool's buffer
        pool.register_with_event_loop(hub)
        writer = DirectWriter(CeleryPool(pool), hub)
        pool.apply_async(int, ("1",), callback=results.append)
        await_results(1)
        pool.apply_async(int, ("2",), callback=results.append)
        assert len(pool.outbound_buffer) == 1
        # When what waits is written
        writer.write()
        # Then the child has it, before the event loop has come round
        assert not pool.outbound_buffer
        await_results(2)
        assert results == [1, 2]
    finally:
        pool.terminate()
        pool.join()


def test_a_pool_that_took_a_child_for_dead_is_registered_anew_and_hears_of_its_end():
    hub = Hub()
    pool = AsynPool(processes=2, threads=False)
    try:
        # Given a pool that was told of the end of a child which lives: an event of an earlier owner of its descriptor
        pool.register_with_event_loop(hub)
        child = pool._pool[0]
        pool._event_process_exit(hub, child)
        assert is_alive(child.pid)
        hub.reset()
        with pytest.raises(ValueError, match="file descriptor is None"):
            pool.register_with_event_loop(hub)
        hub.reset()
        # When it is registered with the event loop after the next connect
        listen_anew(CeleryPool(pool))
        pool.register_with_event_loop(hub)
        # Then it hears of the end of the child, and replaces it
        os.kill(child.pid, signal.SIGKILL)
        loop = hub.create_loop()
        for _ in range(1_000):
            if child not in pool._pool and len(pool._pool) == 2:
                return
            next(loop)
        pytest.fail("the child was not replaced")
    finally:
        pool.terminate()
        pool.join()


def test_a_run_that_is_struck_off_before_a_child_has_it_counts_as_cut_off():
    # Given a run in the pool's buffer, and one that is not in the pool yet
    job = SimpleNamespace(_write_to=None, _scheduled_for=None)
    inner = SimpleNamespace(outbound_buffer=[job])
    pool = PreforkPool(SimpleNamespace(pool=SimpleNamespace(_pool=inner)))
    handed_over = SimpleNamespace(_apply_result=lambda: job, time_start=None, is_cut_off=False)
    judged = SimpleNamespace(_apply_result=None, time_start=None, is_cut_off=False)
    # When nothing is to be ended, then nobody is told so
    assert pool.cut_off([judged]) is None
    assert not judged.is_cut_off
    # When the buffered one is struck off, then no process was killed, but the connection must go
    assert pool.cut_off([handed_over, judged]) == set()
    assert handed_over.is_cut_off
    assert inner.outbound_buffer == []
