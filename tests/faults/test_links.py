"""Links that go silent, flap, or are throttled by the broker: the worker comes back, and never stops in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from kombu import Connection

from celery_sharding.testing import FaultProxy
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


def expect_work_of(shop: Shop, worker: str, *, start: int) -> None:
    """Publish until the named worker owns a shard and everything published has run: it has not stopped in silence."""
    numbers = iter(range(start, start + 100_000, 8))

    def owns_and_runs() -> bool:
        first = next(numbers)
        for number in range(first, first + 8):
            shop.send("step", f"k{number % 8}", number)
        return shop.trace.wait_for(len(set(shop.published)), timeout_seconds=20) and worker in shop.owners()

    assert wait_until(owns_and_runs, timeout_seconds=60), (shop.owners(), shop.verdict())


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads",)))
def test_a_worker_behind_a_half_open_link_is_replaced_and_comes_back(shop: Shop, proxy: FaultProxy, pool: str) -> None:
    # Given a worker behind a proxy with a long task, and a standby with a link of its own
    cut_off = shop.worker(*pool_options(pool, 2), SHOP_BROKER=proxy.url, SHOP_HEARTBEAT="2")
    shop.send("step", "long", 1, seconds=12)
    for number in range(2, 60):
        shop.send("step", f"k{number % 8}", number, seconds=0.05)
    assert shop.trace.wait_for(5)
    shop.worker(*pool_options(pool, 2), SHOP_HEARTBEAT="2")
    # When its link swallows everything, both ways, and nobody is told
    proxy.blackhole()
    # Then the standby takes over, and runs all that is left in its order; what ran at the zombie may overlap its replay
    assert shop.trace.wait_for(59, timeout_seconds=60), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order) == (0, 0), verdict
    assert verdict.overlapping <= 2, verdict
    # And when the link is whole again, the worker takes part again
    proxy.heal()
    expect_work_of(shop, cut_off.name, start=100)


def test_a_solo_worker_behind_a_half_open_link_is_replaced_in_the_middle_of_a_task(
    shop: Shop, proxy: FaultProxy
) -> None:
    # Given a solo worker behind a proxy in a long task, and a standby
    shop.worker("-P", "solo", SHOP_BROKER=proxy.url, SHOP_HEARTBEAT="2")
    shop.send("step", "long", 1, seconds=60)
    assert shop.trace.wait_for(1, kind="start")
    for number in range(2, 42):
        shop.send("step", f"k{number % 8}", number)
    shop.worker("-c", "2", SHOP_HEARTBEAT="2")
    # When its link swallows everything, both ways, and nobody is told
    proxy.blackhole()
    # Then the standby runs the others, in order, before the task at the zombie has ended
    assert shop.trace.wait_for(40, timeout_seconds=45), shop.verdict()
    assert not any(mark.kind == "end" and mark.key == "long" for mark in shop.trace.read())
    shop.published.remove(("long", 1))
    assert shop.verdict().out_of_order == 0, shop.verdict()


def test_no_effect_happens_twice_when_a_zombie_overlaps_its_replacement(
    group_name: str, broker_url: str, redis_url: str, tmp_path, proxy: FaultProxy
) -> None:
    # Given a worker of threads, which cannot be killed, behind a proxy, in the middle of payments; and a standby
    shop = Shop(group_name, broker_url, tmp_path, app="payments", backend=redis_url)
    shop.make_ledger()
    try:
        pool = ("-c", "4", "-P", "threads")
        shop.worker(*pool, SHOP_BROKER=proxy.url, SHOP_HEARTBEAT="2")
        for number in range(40):
            shop.send("pay", f"k{number % 8}", number, event=f"{group_name}-{number}", seconds=0.1)
        assert shop.trace.wait_for(4)
        shop.worker(*pool, SHOP_HEARTBEAT="2")
        # When the link goes silent
        proxy.blackhole()
        # Then every payment is made, and none twice
        assert wait_until(lambda: len(shop.paid()) >= 40, timeout_seconds=60), shop.paid()
        assert wait_until(shop.has_nothing_left, timeout_seconds=60)
        assert Counter(shop.paid()) == Counter(range(40))
    finally:
        shop.kill_workers()


def test_a_link_that_flaps_costs_only_repeats(shop: Shop, proxy: FaultProxy) -> None:
    # Given a worker behind a proxy, and messages for a while
    shop.worker("-c", "2", SHOP_BROKER=proxy.url)
    for number in range(160):
        shop.send("step", f"k{number % 8}", number, seconds=0.02)
    assert shop.trace.wait_for(10)
    # When its connections are cut each time that it has connected again and run something
    for _ in range(5):
        proxy.cut(reset=True)
        before = len(shop.trace.read())
        assert wait_until(lambda before=before: len(shop.trace.read()) > before, timeout_seconds=30), shop.verdict()
    # Then everything runs, in order, one at a time
    assert shop.trace.wait_for(160, timeout_seconds=60), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.overlapping, verdict.out_of_order) == (0, 0, 0), verdict


def test_a_cut_connection_of_greenlets_loses_and_reorders_nothing(shop: Shop, proxy: FaultProxy) -> None:
    # Given an owner with a gevent pool behind a proxy, at work, and a standby
    pool = ("-c", "8", "-P", "gevent")
    cut_off = shop.worker(*pool, SHOP_BROKER=proxy.url)
    for number in range(200):
        shop.send("step", f"k{number % 16}", number, seconds=0.05)
    assert shop.trace.wait_for(20)
    shop.worker(*pool)
    # When its connections are cut
    proxy.cut(reset=True)
    # Then all runs, in order; what ran goes on, and may overlap its repeat at the other worker
    assert shop.trace.wait_for(200), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order) == (0, 0), verdict
    assert verdict.overlapping <= 8, verdict
    assert verdict.repeated <= 2 * 8, verdict
    # And it takes part again
    expect_work_of(shop, cut_off.name, start=1000)


def test_a_broker_that_cannot_be_reached_for_a_while_is_found_again(shop: Shop, proxy: FaultProxy) -> None:
    # Given a worker that has run something, and acknowledged it
    worker = shop.worker("-c", "2", SHOP_BROKER=proxy.url)
    for number in range(8):
        shop.send("step", f"k{number}", number)
    assert shop.trace.wait_for(8)
    assert wait_until(shop.has_nothing_left, timeout_seconds=30)
    # When the broker refuses its connections until it has tried twice in vain
    proxy.refuse()
    worker.wait_for("Trying again in 1.00")
    proxy.heal()
    # Then it consumes again by itself
    expect_work_of(shop, worker.name, start=100)
    assert shop.verdict().is_clean, shop.verdict()


@pytest.fixture
def blocked_broker(rabbitmqctl: Callable[..., str]) -> Iterator[Callable[[bool], None]]:
    """Set and clear the broker's memory alarm."""

    def block(on: bool) -> None:
        rabbitmqctl("set_vm_memory_high_watermark", "0.00001" if on else "0.6")

    yield block
    block(False)


@pytest.mark.restarts_broker  # no other test may publish meanwhile
def test_workers_go_on_through_a_memory_alarm(shop: Shop, blocked_broker: Callable[[bool], None]) -> None:
    # Given a worker with a backlog, in which a task asks for retries
    shop.worker("-c", "2")
    shop.send("again", "r", 0, times=2, countdown=0.5)
    for number in range(1, 60):
        shop.send("step", f"k{number % 8}" if number % 10 else "r", number, seconds=0.1)
    assert shop.trace.wait_for(3)
    # When the broker blocks everybody who publishes
    blocked_broker(True)
    # Then what needs no publish runs on; and when the alarm is over, the rest does
    assert shop.trace.wait_for(40, timeout_seconds=40), shop.verdict()
    blocked_broker(False)
    assert shop.trace.wait_for(60, timeout_seconds=60), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


@pytest.fixture
def impatient_broker(rabbitmqctl: Callable[..., str]) -> Iterator[None]:
    """A broker that waits three seconds for an acknowledgement, and looks every second."""
    rabbitmqctl("eval", "application:set_env(rabbit, consumer_timeout, 3000).")
    rabbitmqctl("eval", "application:set_env(rabbit, channel_tick_interval, 1000).")
    yield
    rabbitmqctl("eval", "application:set_env(rabbit, consumer_timeout, 1800000).")
    rabbitmqctl("eval", "application:set_env(rabbit, channel_tick_interval, 60000).")


@pytest.mark.restarts_broker
@pytest.mark.usefixtures("impatient_broker")
@pytest.mark.parametrize(
    "told_seconds", [pytest.param("3", id="told"), pytest.param("1800", id="not told", marks=pytest.mark.slow)]
)
def test_a_broker_with_a_short_consumer_timeout_takes_nothing_away_for_good(shop: Shop, told_seconds: str) -> None:
    # Given a worker that knows how long the broker waits, or does not, and tasks that are short, but wait for long
    shop.worker("-c", "2", SHOP_CONSUMER_TIMEOUT=told_seconds)
    for number in range(14):
        shop.send("step", "a", number, seconds=1)
    # Then all of them run, in order
    assert shop.trace.wait_for(14, timeout_seconds=100), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.overlapping, verdict.out_of_order) == (0, 0, 0), verdict
    # And the worker goes on
    shop.send("step", "a", 14)
    assert shop.trace.wait_for(15), shop.verdict()
    with Connection(shop.broker_url) as connection:
        assert connection.channel().queue_declare(shop.names.dead, passive=True).message_count == 0
