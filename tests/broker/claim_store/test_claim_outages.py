"""The claim store away while deduplicated messages wait: nothing is lost, nothing overtakes, and it is said."""

from __future__ import annotations

from itertools import product

import pytest
from celery import Celery
from kombu import Connection

from celery_sharding.monitoring.health import check_health
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.status import Snapshot
from celery_sharding.operations.dead_letters import read_dead
from celery_sharding.testing.processes import wait_until
from celery_sharding.testing.redis_node import RedisNode
from support.pools import POOLS, pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(240)

EACH = pools("prefork", slow=("threads", "solo", "gevent"))
AWAY_SECONDS = 8.0


def look(shop: Shop) -> Snapshot:
    with Connection(shop.broker_url) as connection:
        return read_snapshot(connection, [shop.group])


@pytest.mark.parametrize(
    ("pool", "way"),
    [
        ("prefork", "stopped"),
        ("threads", "silent"),
        *(
            pytest.param(pool, way, marks=pytest.mark.slow)
            for pool, way in product(POOLS, ("stopped", "silent"))
            if (pool, way) not in {("prefork", "stopped"), ("threads", "silent")}
        ),
    ],
)
def test_an_outage_of_the_claim_store_loses_no_message_and_no_order(
    shop: Shop, store: RedisNode, pool: str, way: str
) -> None:
    # Given 600 messages on 100 keys, each with a dedup key of its own, of which some have run
    for number in range(600):
        shop.send("once", f"k{number % 100}", number, event=f"{shop.group}-{number}")
    worker = shop.worker(*pool_options(pool))
    assert shop.trace.wait_for(60, timeout_seconds=60)
    # When the store goes away for a while, and comes back
    store.stop() if way == "stopped" else store.pause()
    assert wait_until(lambda: shop.is_store_away_for(AWAY_SECONDS), timeout_seconds=60), worker.output[-3000:]
    store.start() if way == "stopped" else store.resume()
    # Then each message runs exactly once, in the order of its key
    assert shop.trace.wait_for(600, timeout_seconds=120), (shop.trace.count(), worker.output[-3000:])
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    verdict = shop.verdict()
    assert verdict.is_clean, verdict
    assert shop.trace.count() == 600
    assert shop.status().dead_letters == 0
    # And the worker has said so in a few lines
    ours = [line for line in worker.output.splitlines() if "claim" in line or "lease" in line or "ignored" in line]
    assert 2 <= len(ours) <= 40, ours


@pytest.mark.parametrize("pool", EACH)
def test_messages_that_fail_without_the_claim_store_say_so(shop: Shop, store: RedisNode, pool: str) -> None:
    # Given a store that is away, and tasks that rather fail than wait: one keeps results, the other does not
    shop.env["SHOP_SETTINGS"] = "{}"
    worker = shop.worker(*pool_options(pool))
    assert wait_until(lambda: all(shop.owners()), timeout_seconds=60)
    store.stop()
    for number in range(3):
        for task in ("strict", "strict_ignored"):
            task_id = f"{shop.group}-{task}-{number}"
            shop.send(task, f"{task}{number}", number, task_id=task_id, event=task_id)
    # When they have ended, in vain
    assert wait_until(lambda: shop.status().dead_letters >= 3, timeout_seconds=120), worker.output[-3000:]
    store.start()
    # Then each is a dead letter, or has a state
    results = Celery(backend=store.url, set_as_current=False)
    told = {f"{shop.group}-{task}-{number}" for task in ("strict", "strict_ignored") for number in range(3)}

    def accounted() -> set[str]:
        dead = {str(letter.task_id) for letter in read_dead(shop.app.sharding.connect, shop.group, limit=100).letters}
        states = {each for each in told if results.AsyncResult(each).state == "FAILURE"}
        return dead | states

    assert wait_until(lambda: accounted() >= told, timeout_seconds=120), (accounted(), worker.output[-3000:])
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    assert shop.trace.count() == 0


@pytest.mark.parametrize("pool", EACH)
def test_a_worker_that_is_replaced_in_an_outage_hands_over_what_waits(shop: Shop, store: RedisNode, pool: str) -> None:
    # Given a worker whose messages wait for the claim store, killed and restarted more often than a message may begin
    worker = shop.worker(*pool_options(pool))
    assert wait_until(lambda: all(shop.owners()), timeout_seconds=60)
    store.stop()
    for number in range(40):
        shop.send("once", f"k{number % 8}", number, event=f"{shop.group}-{number}")
    for _ in range(4):
        assert wait_until(lambda: shop.is_store_away_for(0.5), timeout_seconds=60), worker.output[-3000:]
        worker.kill()
        worker.start()
    # And shut down warm, with ordinary work done beside the outage
    assert wait_until(lambda: shop.is_store_away_for(0.5), timeout_seconds=60)
    assert worker.stop() == 0
    worker.start()
    # When the store is back
    assert wait_until(lambda: shop.is_store_away_for(0.5), timeout_seconds=60)
    store.start()
    # Then each ran once, in order, and none died of the waiting
    assert shop.trace.wait_for(40, timeout_seconds=120), worker.output[-3000:]
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    assert shop.verdict().is_clean, shop.verdict()
    assert shop.status().dead_letters == 0


def test_an_outage_is_shown_and_other_tasks_go_on(shop: Shop, store: RedisNode) -> None:
    # Given a worker with one slot whose claim store is silent
    shop.worker("-c", "1")
    assert wait_until(lambda: all(shop.owners()), timeout_seconds=60)
    store.pause()
    for number in range(20):
        shop.send("once", f"k{number}", number, event=f"{shop.group}-{number}")
    assert wait_until(lambda: shop.is_store_away_for(1), timeout_seconds=60)
    # When an ordinary task comes, then it gets the slot
    with shop.occupied():
        pass
    # And the outage is a problem, which says what waits
    snapshot = look(shop)
    assert any("claim store unreachable" in line for line in check_health(snapshot).problems)
    assert sum(row.store_waiting for row in snapshot.groups[0].rows) > 0
    store.resume()
    assert shop.trace.wait_for(20, timeout_seconds=60)
    assert wait_until(lambda: shop.status().store_away_since is None, timeout_seconds=60)
