"""Who owns what: spread evenly, moved only when needed, and never at the cost of a neighbour."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from kombu import Connection

from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.rabbitmq.streams import read_to_end
from celery_sharding.testing.processes import wait_until
from support.shops import Shop

pytestmark = pytest.mark.timeout(170)


def states(shop: Shop) -> Counter[str]:
    with Connection(shop.broker_url) as connection:
        return Counter(row.state for row in read_snapshot(connection, [shop.group]).groups[0].shards)


def count_taken(shop: Shop) -> int:
    """Return how often a shard was taken by a worker so far."""
    with Connection(shop.broker_url) as connection:
        events = [event for _, event in read_to_end(connection, shop.names.journal)]
    return sum(event["event"] == "handover" and event["change"] == "taken" for event in events)


def is_even(shop: Shop, workers: int) -> bool:
    """Say whether every shard has an owner, and no worker owns two shards more than another."""
    owned = Counter(shop.owners())
    return None not in owned and len(owned) == workers and max(owned.values()) - min(owned.values()) <= 1


def test_workers_that_join_and_leave_take_their_part_and_nothing_else_moves(shop: Shop) -> None:
    # Given two workers that share eight shards
    env = {"SHOP_SHARDS": "8"}
    first = shop.worker("-c", "1", **env)
    shop.worker("-c", "1", **env)
    assert wait_until(lambda: is_even(shop, 2), timeout_seconds=40), shop.owners()
    taken = count_taken(shop)
    # When a third joins
    shop.worker("-c", "1", **env)
    assert wait_until(lambda: is_even(shop, 3), timeout_seconds=40), shop.owners()
    # Then two shards have moved, and the rest stays where it is while tasks run everywhere
    assert count_taken(shop) == taken + 2
    for number in range(80):
        shop.send("step", f"k{number % 40}", number, seconds=0.05)
    assert shop.trace.wait_for(80), shop.verdict()
    assert is_even(shop, 3)
    assert count_taken(shop) == taken + 2
    # When one is killed, then the others share what it owned
    first.kill()
    assert wait_until(lambda: is_even(shop, 2), timeout_seconds=40), shop.owners()
    assert shop.verdict().is_clean, shop.verdict()


@pytest.mark.slow
def test_eight_workers_share_64_shards_and_only_what_must_moves(shop: Shop) -> None:
    # Given seven workers that share 64 shards
    env = {"SHOP_SHARDS": "64"}
    for _ in range(7):
        shop.worker("-c", "1", "-P", "threads", **env)
    assert wait_until(lambda: is_even(shop, 7), timeout_seconds=100), shop.owners()
    taken = count_taken(shop)
    # When an eighth joins, then it gets eight of them, and nothing else moves
    shop.worker("-c", "1", "-P", "threads", **env)
    assert wait_until(lambda: is_even(shop, 8), timeout_seconds=60), shop.owners()
    assert count_taken(shop) == taken + 8
    # When one is killed, then the others share its eight
    shop.workers[3].kill()
    assert wait_until(lambda: is_even(shop, 7), timeout_seconds=60), shop.owners()


def test_a_task_that_runs_for_long_keeps_its_shard_and_holds_no_neighbour(shop: Shop) -> None:
    # Given a worker with a long task in each of its four shards, which a second worker would like to share
    keys = [f"long{number}" for number in range(16)]
    first = shop.worker("-c", "24", "-P", "threads")
    for key in keys:
        shop.send("step", key, 1, seconds=25)
    assert shop.trace.wait_for(len(keys), kind="start")
    second = shop.worker("-c", "4")
    # When other keys of the same shards go on
    for number in range(2, 22):
        for neighbour in range(8):
            shop.send("step", f"k{neighbour}", number)
        # Then all of them run, though the long ones have not ended
        assert shop.trace.wait_for(8 * (number - 1), timeout_seconds=15), shop.verdict()
        assert not any(mark.kind == "end" and mark.key in keys for mark in shop.trace.read())
        assert set(shop.owners()) == {first.name}
    # And the shards are shared when they have
    assert shop.trace.wait_for(len(shop.published)), shop.verdict()
    assert wait_until(lambda: Counter(shop.owners())[second.name] == 2, timeout_seconds=40), shop.owners()
    assert shop.verdict().is_clean, shop.verdict()


def test_an_owner_that_hangs_is_shown_as_stuck(shop: Shop) -> None:
    # Given a worker that is stopped in the middle of its work, still connected
    worker = shop.worker("-c", "2")
    assert wait_until(lambda: set(shop.owners()) == {worker.name}, timeout_seconds=30), shop.owners()
    for number in range(40):
        shop.send("step", f"k{number}", number, seconds=0.2)
    assert shop.trace.wait_for(4)
    worker.signal(signal.SIGSTOP)
    # When it has been silent for a while, then its shards are shown as stuck
    try:
        assert wait_until(lambda: states(shop) == {"stuck": 4}, timeout_seconds=30), states(shop)
    finally:
        worker.signal(signal.SIGCONT)
    # And when it goes on, as what they are
    assert shop.trace.wait_for(40), shop.verdict()
    assert wait_until(lambda: states(shop) == {"no standby": 4}, timeout_seconds=30), states(shop)
    assert shop.verdict().is_clean, shop.verdict()


def test_a_run_that_was_announced_and_did_not_begin_costs_no_message_its_only_attempt(shop: Shop) -> None:
    # Given a group of one attempt, and a worker that was killed in the middle of tasks that may start at some rate only
    env = {"SHOP_MAX_ATTEMPTS": "1", "SHOP_SHARDS": "8"}
    killed = shop.worker("-c", "16", **env)
    for number in range(64):
        shop.send("limited", f"k{number}", number)
    assert shop.trace.wait_for(2)
    killed.kill()
    # When their next owner, which has announced what it may not start yet, hands shards over to one that joins
    owner = shop.worker("-c", "16", **env)
    assert wait_until(lambda: set(shop.owners()) == {owner.name}, timeout_seconds=30), shop.owners()
    taken = count_taken(shop)
    shop.worker("-c", "16", **env)
    assert wait_until(lambda: count_taken(shop) > taken, timeout_seconds=60)
    assert is_even(shop, 2) or wait_until(lambda: is_even(shop, 2), timeout_seconds=60), shop.owners()
    # Then all run, once, and none is a dead letter
    assert shop.trace.wait_for(64, timeout_seconds=90), (shop.verdict(), shop.dead_letters(0))
    assert shop.dead_letters(0) == []
    assert shop.verdict().lost == 0, shop.verdict()
