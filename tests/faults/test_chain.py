"""The chain of segments while its actors freeze: the holder of the lock, and the owner of a queue that ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from kombu import Connection

from celery_sharding.config import ShardGroup
from celery_sharding.layout.ensure import ensure_group, find_fault
from celery_sharding.layout.manifest import load
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)

# Begins a recovery, says so, and waits with the lock in its hands; ends with what it is told when it goes on.
HOLDER = """
import sys
from kombu import Connection
from celery_sharding.layout.switch import begin_recovery, carry_on
from celery_sharding.config import ShardGroup
from celery_sharding.errors import LockLost
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load
from celery_sharding.topology import Names

url, group = sys.argv[1], ShardGroup(sys.argv[2], 4)
try:
    with GroupLock(lambda: Connection(url), Names(group.name), timeout_seconds=5) as lock:
        with lock.operation() as connection:
            layout = begin_recovery(connection, group, load(connection, Names(group.name)), by="holder")
            layout = carry_on(connection, group, layout, by="holder", last_step=3)
        print("holding", flush=True)
        sys.stdin.readline()
        with lock.operation() as connection:
            carry_on(connection, group, layout, by="holder")
            print("went on", flush=True)
except LockLost:
    print("lost", flush=True)
"""


def test_a_holder_of_the_lock_that_freezes_is_replaced_and_can_change_nothing_later(
    broker_url: str, group_name: str
) -> None:
    # Given a process in the middle of a recovery, which freezes with its connection open
    group, names = ShardGroup(group_name, 4), Names(group_name)
    ensure_group(lambda: Connection(broker_url), group, owner="first")
    with Connection(broker_url) as connection:
        connection.channel().exchange_delete(names.ring(1))
    command = [sys.executable, "-c", HOLDER, broker_url, group_name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        holder.send_signal(signal.SIGSTOP)
        try:
            # When another one looks, then it gets the lock as soon as the broker misses the holder's heartbeats
            layout = ensure_group(lambda: Connection(broker_url), group, owner="second", wait_seconds=90)
        finally:
            holder.send_signal(signal.SIGCONT)
        # And the holder finds out, and has changed nothing
        answer, _ = holder.communicate("\n", timeout=60)
    assert answer == "lost\n"
    with Connection(broker_url) as connection:
        assert load(connection, names) == layout
        assert find_fault(connection, names, layout) is None


def test_a_zombie_at_the_end_of_a_segment_changes_nothing(shop: Shop) -> None:
    # Given a worker that freezes with messages in its lanes, and a ring that is replaced meanwhile
    zombie = shop.worker("-c", "2", SHOP_HEARTBEAT="2")
    for number in range(60):
        shop.send("step", f"k{number % 8}", number, seconds=0.05)
    assert shop.trace.wait_for(6)
    zombie.signal(signal.SIGSTOP)
    with Connection(shop.broker_url) as connection:
        connection.channel().exchange_delete(shop.names.ring(1))
    ensure_group(lambda: Connection(shop.broker_url), ShardGroup(shop.group, 4), owner="test")
    for number in range(60, 90):
        shop.send("step", f"k{number % 8}", number)
    # When another worker takes over, comes to the end of the segment, and goes on
    shop.worker("-c", "2", SHOP_HEARTBEAT="2")
    assert shop.trace.wait_for(90, timeout_seconds=60), shop.verdict()
    # Then the zombie, when it wakes, finds nothing to do, and takes part in what comes
    zombie.signal(signal.SIGCONT)
    assert wait_until(lambda: zombie.name in shop.owners(), timeout_seconds=60), shop.owners()
    for number in range(90, 120):
        shop.send("step", f"k{number % 8}", number)
    assert shop.trace.wait_for(120), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order) == (0, 0), verdict
    # Its children, which were not frozen, may have ended what they ran beside the replay
    assert verdict.overlapping <= 2, verdict
    with Connection(shop.broker_url) as connection:
        assert len(load(connection, shop.names).open_segments) == 1
