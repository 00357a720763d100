"""The claim store away while deduplicated messages wait: nothing is lost, nothing overtakes, and it is said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection
from shops import Shop

from celery_sharding.admin.snapshot import read_snapshot
from celery_sharding.admin.status import GroupStatus, Snapshot
from celery_sharding.testing.processes import wait_until
from celery_sharding.testing.redis_node import RedisNode

pytestmark = pytest.mark.timeout(240)

POOLS = {
    "prefork": ("-c", "4"),
    "threads": ("-c", "4", "-P", "threads"),
    "solo": ("-P", "solo"),
    "gevent": ("-c", "4", "-P", "gevent"),
}
AWAY_SECONDS = 8.0


@pytest.fixture
def store() -> Iterator[RedisNode]:
    with RedisNode(keeps_data=True) as node:
        yield node


@pytest.fixture
def shop(group_name: str, broker_url: str, store: RedisNode, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(group_name, broker_url, tmp_path, app="payments", backend=store.url)
    # Results would be stored in the same place, for which Celery keeps a slot up to two minutes.
    shop.env["SHOP_SETTINGS"] = '{"task_ignore_result": true}'
    yield shop
    shop.kill_workers()


def look(shop: Shop) -> Snapshot:
    with Connection(shop.broker_url) as connection:
        return read_snapshot(connection, [shop.group])


def status(shop: Shop) -> GroupStatus:
    return look(shop).groups[0]


def is_away_for(shop: Shop, seconds: float) -> bool:
    since = status(shop).store_away_since
    return since is not None and time.time() - since >= seconds


@pytest.mark.parametrize("way", ["stopped", "silent"])
@pytest.mark.parametrize("pool", POOLS)
def test_an_outage_of_the_claim_store_loses_no_message_and_no_order(
    shop: Shop, store: RedisNode, pool: str, way: str
) -> None:
    # Given 600 messages on 100 keys, each with a dedup key of its own, of which some have run
    for number in range(600):
        shop.send("once", f"k{number % 100}", number, event=f"{shop.group}-{number}")
    worker = shop.worker(*POOLS[pool])
    assert shop.trace.wait_for(60, timeout_seconds=60)
    # When the store goes away for a while, and comes back
    store.stop() if way == "stopped" else store.pause()
    assert wait_until(lambda: is_away_for(shop, AWAY_SECONDS), timeout_seconds=60), worker.output[-3000:]
    store.start() if way == "stopped" else store.resume()
    # Then each message runs exactly once, in the order of its key
    assert shop.trace.wait_for(600, timeout_seconds=120), (shop.trace.count(), worker.output[-3000:])
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    verdict = shop.verdict()
    assert verdict.is_clean, verdict
    assert shop.trace.count() == 600
    assert status(shop).dead_letters == 0
    # And the worker has said so in a few lines
    ours = [line for line in worker.output.splitlines() if "claim" in line or "lease" in line or "ignored" in line]
    assert 2 <= len(ours) <= 40, ours
