"""Workers go along the chain of segments in order, and a key that waits in one of them holds no other key."""

from __future__ import annotations

import pytest
from kombu import Connection

from celery_sharding.config import ShardGroup
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.manifest import load
from celery_sharding.layout.model import Layout
from celery_sharding.testing.processes import wait_until
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)

KEYS = [f"k{number}" for number in range(12)]


def lose_ring(shop: Shop, generation: int) -> None:
    """Delete a ring as a restart of the broker would, and look at the group at once, as a worker does now and then."""
    with Connection(shop.broker_url) as connection:
        connection.channel().exchange_delete(shop.names.ring(generation))


def look(shop: Shop) -> Layout:
    return ensure_group(lambda: Connection(shop.broker_url), ShardGroup(shop.group, 4), owner="test")


def layout_of(shop: Shop) -> Layout:
    with Connection(shop.broker_url) as connection:
        return load(connection, shop.names)


def send_round(shop: Shop, number: int, *keys: str) -> None:
    for key in keys:
        shop.send("step", key, number)


def test_a_key_that_waits_for_a_retry_does_not_hold_the_others_when_the_ring_is_lost(shop: Shop) -> None:
    # Given two workers, and a key whose first task will be retried after a long time
    shop.worker("-c", "2")
    shop.worker("-c", "2")
    # Four segments come to their ends meanwhile, some seconds each.
    retried = shop.send("again", "r", 0, times=1, countdown=45)
    send_round(shop, 1, "r", *KEYS)
    assert shop.trace.wait_for(len(KEYS))
    # When the ring is lost twice, and all keys go on each time
    lose_ring(shop, 1)
    send_round(shop, 2, "r", *KEYS)
    look(shop)
    send_round(shop, 3, "r", *KEYS)
    assert shop.trace.wait_for(3 * len(KEYS)), shop.verdict()
    lose_ring(shop, 2)
    send_round(shop, 4, "r", *KEYS)
    look(shop)
    send_round(shop, 5, "r", *KEYS)
    # Then all others run to their ends while the key waits
    assert shop.trace.wait_for(5 * len(KEYS)), shop.verdict()
    assert not [mark for mark in shop.trace.read() if mark.key == "r" and mark.kind == "end"]
    assert layout_of(shop).open_segments[0].name == "g001"
    # And then the key runs, too, in its order, and the chain is drained
    assert retried.get(timeout=70) == 1
    assert shop.trace.wait_for(5 * len(KEYS) + 6), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
    assert wait_until(lambda: len(layout_of(shop).open_segments) == 1, timeout_seconds=20)


@pytest.mark.parametrize("end", [pytest.param("stop", marks=pytest.mark.slow), "kill"])
def test_a_key_that_waits_behind_the_end_of_a_segment_keeps_its_order_under_the_next_owner(
    shop: Shop, end: str
) -> None:
    # Given a key that waits for a retry, and a ring that was lost and replaced meanwhile
    first = shop.worker("-c", "2")
    retried = shop.send("again", "r", 0, times=1, countdown=15)
    send_round(shop, 1, "r", *KEYS)
    assert shop.trace.wait_for(len(KEYS))
    lose_ring(shop, 1)
    look(shop)
    send_round(shop, 2, "r", *KEYS)
    assert shop.trace.wait_for(2 * len(KEYS)), shop.verdict()
    # When the worker that holds it is gone, and another takes over
    getattr(first, end)()
    shop.worker("-c", "2")
    send_round(shop, 3, "r", *KEYS)
    # Then the others go on, and the key runs in its order when it is due
    assert shop.trace.wait_for(3 * len(KEYS)), shop.verdict()
    assert retried.get(timeout=60) == 1
    assert shop.trace.wait_for(3 * len(KEYS) + 4), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.overlapping, verdict.out_of_order) == (0, 0, 0), verdict
    assert end == "kill" or verdict.repeated == 0, verdict
    assert wait_until(lambda: len(layout_of(shop).open_segments) == 1, timeout_seconds=20)
