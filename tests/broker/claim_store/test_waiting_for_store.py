"""What happens to messages while they wait for the claim store: revoked, expired, paused, handed over."""

from __future__ import annotations

import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.operations import pause as pausing
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.testing.processes import wait_until
from celery_sharding.testing.redis_node import RedisNode
from support.pools import pool_options, pools
from support.raw_messages import task_message
from support.shops import Shop

pytestmark = pytest.mark.timeout(200)

EACH = pools("prefork", slow=("threads", "solo", "gevent"))


def send(shop: Shop, key: str, number: int, **options: object) -> str:
    task_id = f"{shop.group}-{key}{number}"
    shop.send("once", key, number, event=task_id, task_id=task_id, **options)
    return task_id


def store_waiting(shop: Shop) -> int:
    return sum(row.store_waiting for row in shop.status().rows)


@pytest.mark.parametrize("pool", EACH)
def test_a_message_that_waits_for_the_claim_store_is_revoked_and_expires(
    shop: Shop, store: RedisNode, pool: str
) -> None:
    # Given three keys whose heads wait for the claim store, one of them until it expires, and what waits behind them
    worker = shop.worker(*pool_options(pool))
    assert wait_until(lambda: all(shop.owners()), timeout_seconds=60)
    store.stop()
    expiring = [send(shop, "a", 0), send(shop, "a", 1, expires=5), send(shop, "a", 2)][1]
    head, behind = send(shop, "b", 0), [send(shop, "b", 1), send(shop, "b", 2)][0]
    expiring_head, _ = send(shop, "c", 0, expires=5), send(shop, "c", 1)
    assert wait_until(lambda: store_waiting(shop) >= 2, timeout_seconds=60), worker.output[-3000:]

    def was_discarded(task_id: str) -> bool:
        return f"Discarding revoked task: payments.once[{task_id}]" in worker.output

    # When the head of one and a message behind it are revoked, then the heads go while the store is away
    shop.app.control.revoke([head, behind])
    for gone in (head, expiring_head):
        assert wait_until(lambda gone=gone: was_discarded(gone), timeout_seconds=60), worker.output[-3000:]
    assert shop.trace.count("start") == 0
    # And when it is back, the others run, in order, and what is not wanted any more does not
    assert shop.is_store_away_for(0)
    store.start()
    assert shop.trace.wait_for(4, timeout_seconds=60), worker.output[-3000:]
    assert wait_until(shop.has_nothing_left, timeout_seconds=60), worker.output[-3000:]
    ran = [(mark.key, mark.number) for mark in shop.trace.read() if mark.kind == "end"]
    assert sorted(ran) == [("a", 0), ("a", 2), ("b", 2), ("c", 1)]
    assert ran.index(("a", 0)) < ran.index(("a", 2))
    assert was_discarded(behind)
    assert was_discarded(expiring)
    assert shop.status().dead_letters == 0


@pytest.mark.parametrize("pool", EACH)
def test_what_waits_for_the_claim_store_goes_back_in_order_when_its_shard_is_paused(
    shop: Shop, store: RedisNode, pool: str
) -> None:
    # Given a worker whose messages wait for the claim store
    group = ShardGroup(shop.group, shards=4)
    first = shop.worker(*pool_options(pool))
    assert wait_until(lambda: all(shop.owners()), timeout_seconds=60)
    store.stop()
    for number in range(80):
        send(shop, f"k{number % 16}", number)
    assert wait_until(lambda: shop.is_store_away_for(0.5), timeout_seconds=60), first.output[-3000:]
    index = max(shop.status().shards, key=lambda row: row.waiting).index
    # When their shard is paused, then they are back in its queue, and the other shards run when the store is back
    assert pausing.pause(lambda: Connection(shop.broker_url), group, index, by="ann@test")

    def is_back() -> bool:
        rows = shop.status().shards
        return rows[index].owner is None and sum(row.waiting for row in rows) == 80

    assert wait_until(is_back, timeout_seconds=60), (shop.status(), first.output[-3000:])
    waiting = shop.status().shards[index].ready
    assert waiting
    store.start()
    assert shop.trace.wait_for(80 - waiting, timeout_seconds=60), first.output[-3000:]
    # And when the shard goes on elsewhere, in another outage, then they run there, in order
    store.stop()
    second = shop.worker(*pool_options(pool))
    assert first.stop() == 0
    assert shop.trace.count("start") == 80 - waiting
    assert pausing.resume(lambda: Connection(shop.broker_url), group, index, by="ann@test")
    assert wait_until(lambda: shop.is_store_away_for(0.5), timeout_seconds=60), second.output[-3000:]
    store.start()
    assert shop.trace.wait_for(80, timeout_seconds=60), second.output[-3000:]
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    assert shop.verdict().is_clean, shop.verdict()
    assert shop.status().dead_letters == 0


@pytest.mark.parametrize("pool", EACH)
def test_what_waits_for_the_claim_store_is_handed_over_to_a_worker_that_joins(
    shop: Shop, store: RedisNode, pool: str
) -> None:
    # Given a worker whose messages wait for the claim store
    first = shop.worker(*pool_options(pool))
    assert wait_until(lambda: all(shop.owners()), timeout_seconds=60)
    store.stop()
    for number in range(80):
        send(shop, f"k{number % 16}", number)
    assert wait_until(lambda: shop.is_store_away_for(0.5), timeout_seconds=60), first.output[-3000:]
    # When another joins, then it gets its share of the shards, and more messages come
    second = shop.worker(*pool_options(pool))
    both = sorted([first.name, second.name] * 2)
    assert wait_until(lambda: sorted(map(str, shop.owners())) == both, timeout_seconds=60), shop.owners()
    for number in range(80, 120):
        send(shop, f"k{number % 16}", number)
    assert wait_until(lambda: store_waiting(shop) == 16, timeout_seconds=60), shop.status()
    # And when the store is back, then each runs once, in order
    store.start()
    assert shop.trace.wait_for(120, timeout_seconds=60), (first.output[-3000:], second.output[-3000:])
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    assert shop.verdict().is_clean, shop.verdict()
    assert shop.status().dead_letters == 0


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads",)))
def test_an_ordinary_message_that_names_a_shard_waits_in_its_slot(shop: Shop, store: RedisNode, pool: str) -> None:
    # Given a message of an ordinary queue with the headers of a sharded run, handed on by whoever
    worker = shop.worker(*pool_options(pool))
    store.stop()
    message = task_message("plain.late", {"event": f"{shop.group}-1", "number": 1}, shard_label=f"{shop.group}/1")
    with Connection(shop.broker_url) as connection, brief_channel(connection) as channel:
        channel.basic_publish(message, routing_key=f"{shop.group}-plain")
    # When it has found the claim store away, and that is back
    worker.wait_for("waits for the claim store")
    store.start()
    # Then it runs: it has no lane to be kept in
    assert shop.trace.wait_for(1, timeout_seconds=60), worker.output[-3000:]
