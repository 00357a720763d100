"""A worker whose connection breaks: it recovers by itself, and its shards keep their order. A proxy breaks it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from kombu import Connection

from celery_sharding.layout.lock import GroupLock
from celery_sharding.testing import FaultProxy
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.mark.parametrize("pool", pools("prefork", "threads", slow=("solo",)))
def test_a_worker_whose_connection_is_cut_goes_on_in_order(shop: Shop, proxy: FaultProxy, pool: str) -> None:
    # Given a worker behind a proxy, at work
    shop.worker(*pool_options(pool), SHOP_BROKER=proxy.url)
    for number in range(240):
        shop.send("step", f"k{number % 8}", number)
    # When its connections are cut twice
    cuts = []
    for count in (40, 120):
        assert shop.trace.wait_for(count), shop.verdict()
        cuts.append(time.time())
        proxy.cut()
    # Then all run, none out of order, and no more than what was running, or had just ended, comes twice; threads cannot
    # be killed, so theirs come to an end whose acknowledgement is lost, and as many may have been on their way
    assert shop.trace.wait_for(240, timeout_seconds=60), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    just_ended = sum(shop.just_ended(at) for at in cuts)
    assert verdict.repeated <= (16 if pool == "threads" else 8) + just_ended, verdict


def test_a_long_run_is_killed_when_its_connection_is_cut_and_runs_again_without_overlap(
    shop: Shop, proxy: FaultProxy
) -> None:
    # Given a prefork worker behind a proxy with a long task, and a standby with a connection of its own
    shop.worker("-c", "2", SHOP_BROKER=proxy.url)
    shop.send("step", "a", 1, seconds=6)
    shop.send("step", "a", 2)
    assert shop.trace.wait_for(1, kind="start")
    shop.worker("-c", "2")
    # When the first one's connections are cut
    proxy.cut()
    # Then its run is killed, and the standby runs the task to its end
    assert shop.trace.wait_for(2, timeout_seconds=40), shop.verdict()
    assert [(mark.kind, mark.number) for mark in shop.trace.read()] == [
        ("start", 1),
        ("start", 1),
        ("end", 1),
        ("start", 2),
        ("end", 2),
    ]


def test_a_run_that_a_thread_has_still_to_begin_when_the_connection_is_cut_keeps_its_place(
    shop: Shop, proxy: FaultProxy
) -> None:
    # Given a run that was handed to a pool of threads and has not begun
    shop.worker(*pool_options("threads"), SHOP_BROKER=proxy.url)
    shop.send("slow_to_begin", "a", 1)
    shop.send("step", "a", 2)
    assert shop.trace.wait_for(1, kind="submitted")
    # When the connection is cut
    proxy.cut()
    # Then nothing of its key runs until it has come to its end; its message runs again before the next one
    assert shop.trace.wait_for(2), shop.trace.read()
    marks = [(mark.kind, mark.number) for mark in shop.trace.read() if mark.kind in ("start", "end")]
    assert marks == [("start", 1), ("end", 1), ("start", 1), ("end", 1), ("start", 2), ("end", 2)]


def test_a_run_that_waits_for_a_thread_when_the_connection_is_cut_does_not_begin(shop: Shop, proxy: FaultProxy) -> None:
    # Given a worker whose only thread is busy with an ordinary task, and a run that waits for it
    worker = shop.worker("-c", "1", "-P", "threads", SHOP_BROKER=proxy.url)
    with shop.occupied():
        first = shop.send("step", "a", 1)
        worker.wait_for(f"{first.id}] received")
        shop.send("step", "a", 2)
        # When the connection is cut, and the message comes again
        proxy.cut()
        assert wait_until(lambda: worker.output.count(f"{first.id}] received") == 2, timeout_seconds=30)
    # Then it runs once, and the next of its key after it
    assert shop.trace.wait_for(2), shop.trace.read()
    marks = [(mark.kind, mark.number) for mark in shop.trace.read() if mark.kind in ("start", "end")]
    assert marks == [("start", 1), ("end", 1), ("start", 2), ("end", 2)]


def test_a_retry_that_waits_when_the_connection_is_cut_keeps_its_count(shop: Shop, proxy: FaultProxy) -> None:
    # Given a task between two retries
    shop.worker("-c", "2", SHOP_BROKER=proxy.url)
    shop.send("again", "a", 1, times=2, countdown=2)
    shop.send("step", "a", 2)
    assert shop.trace.wait_for(1, kind="begin")
    # When the connection is cut
    proxy.cut()
    # Then it is retried no more often than it asked for, and its successor comes last
    assert shop.trace.wait_for(2, timeout_seconds=40), shop.trace.read()
    begins = [mark.run for mark in shop.trace.read() if mark.kind == "begin"]
    assert begins[0] == "0"
    assert begins[-1] == "2"
    assert len(begins) <= 4
    assert shop.trace.read()[-1].number == 2


def test_a_worker_without_a_broker_stops_warm_when_it_is_told_to(shop: Shop, proxy: FaultProxy) -> None:
    # Given a worker at work that has lost its broker
    worker = shop.worker("-c", "2", SHOP_BROKER=proxy.url)
    for number in range(40):
        shop.send("step", f"k{number % 8}", number, seconds=0.05)
    assert shop.trace.wait_for(5)
    proxy.refuse()
    worker.wait_for("Trying again")
    # When it is told to stop
    # Then it does, and nothing goes wrong on the way
    assert worker.stop() == 0
    assert "Error on stopping" not in worker.output
    # And another worker runs the rest
    shop.worker("-c", "2")
    assert shop.trace.wait_for(40), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict


def test_a_worker_that_waits_for_its_group_keeps_its_connection(shop: Shop) -> None:
    # Given a group whose lock somebody holds, and a worker with a short heartbeat that has to wait for it
    with GroupLock(lambda: Connection(shop.broker_url), shop.names, timeout_seconds=5):
        worker = shop.worker("-c", "1", "--without-mingle", wait_seconds=0, SHOP_HEARTBEAT="1")
        worker.wait_for("Connected to")
        # When it waits longer than the broker does for who says nothing
        for _ in range(2):
            _wait_until_silence_is_punished(shop.broker_url, heartbeat_seconds=1)
    # Then it becomes ready on the connection that it had
    worker.wait_for(" ready.")
    assert "Connection to broker lost" not in worker.output
    shop.send("step", "a", 1)
    assert shop.trace.wait_for(1)


def _wait_until_silence_is_punished(broker_url: str, *, heartbeat_seconds: int) -> None:
    """Say nothing on a connection until the broker closes it."""
    with Connection(broker_url, heartbeat=heartbeat_seconds) as silent:
        silent.connect()
        try:
            while True:
                silent.drain_events(timeout=20)
        except TimeoutError:
            raise
        except OSError:
            return
