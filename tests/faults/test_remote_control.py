"""`cancel_consumer` and `add_consumer` on a running worker: groups and shards are given up and taken again in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection

from celery_sharding.testing import FaultProxy, WorkerNode
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.publishers import Load
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)

REPLY_SECONDS = 10.0


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


def tell(shop: Shop, worker: WorkerNode, command: str, queue: str) -> dict[str, str]:
    """Send one worker a command about a queue, and return its reply."""
    [reply] = shop.app.control.broadcast(
        command, arguments={"queue": queue}, destination=[worker.name], reply=True, timeout=REPLY_SECONDS, limit=1
    )
    return reply[worker.name]  # type: ignore[no-any-return]


def inspect(shop: Shop, worker: WorkerNode, what: str) -> Any:
    """Return what `celery inspect` says of one worker, which may just be connecting anew."""
    inspection = shop.app.control.inspect([worker.name], timeout=REPLY_SECONDS, limit=1)
    replies: list[Any] = []

    def ask() -> bool:
        replies.append(getattr(inspection, what)())
        return replies[-1] is not None

    assert wait_until(ask, timeout_seconds=40), f"{worker.name} does not answer"
    return replies[-1][worker.name]


def consumed(shop: Shop, worker: WorkerNode) -> list[int]:
    """Return the shards of the group that a worker consumes, as its statistics say."""
    return inspect(shop, worker, "stats")["shards"].get(shop.group, [])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "pool",
    pools("prefork", slow=("threads", "solo")),
)
def test_a_shard_and_then_the_whole_group_are_given_up_under_load_without_a_repetition(shop: Shop, pool: str) -> None:
    # Given an owner at work, and a standby
    owner = shop.worker(*pool_options(pool))
    standby = shop.worker(*pool_options(pool))
    with Load(shop) as load:
        load.wait_for_more(10)
        # When a shard is cancelled, then the owner consumes the other three
        assert tell(shop, owner, "cancel_consumer", f"{shop.group}.003") == {
            "ok": f"no longer consuming from {shop.group}.003"
        }
        assert wait_until(lambda: consumed(shop, owner) == [0, 1, 2], timeout_seconds=20)
        load.wait_for_more(20)
        # When the group is cancelled, then the other worker owns all of it
        tell(shop, owner, "cancel_consumer", shop.group)
        assert wait_until(lambda: consumed(shop, owner) == [], timeout_seconds=20)
        load.wait_for_more(20)
        assert wait_until(lambda: shop.owners() == [standby.name] * 4, timeout_seconds=20), shop.owners()
        # When it is added again, then the owner has its part of it again
        tell(shop, owner, "add_consumer", shop.group)
        assert wait_until(lambda: shop.owners().count(owner.name) == 2, timeout_seconds=40), shop.owners()
        load.wait_for_more(20)
    # Then nothing is lost, repeated, overlapping or out of order
    assert shop.trace.wait_for(load.number), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_a_cancelled_group_lets_its_runs_end_and_its_retries_wait_elsewhere(shop: Shop) -> None:
    # Given an owner with a long task and its successors, and a task whose retry is due in some seconds
    countdown_seconds = 6.0
    owner = shop.worker("-c", "2")
    retried = shop.send("again", "retried", 1, times=1, countdown=countdown_seconds)
    shop.send("step", "retried", 2)
    shop.send("step", "long", 1, seconds=3)
    for number in range(2, 30):
        shop.send("step", "long", number)
    assert shop.trace.wait_for(1, kind="begin")
    assert shop.trace.wait_for(1, kind="start")
    # When the group is cancelled there
    tell(shop, owner, "cancel_consumer", shop.group)
    # Then it is given up when the long task has ended, not when the retry is due, and nothing of it is left
    assert wait_until(lambda: consumed(shop, owner) == [], timeout_seconds=20)
    assert shop.trace.count() == 1
    assert inspect(shop, owner, "reserved") == []
    # And the next owner runs the rest once, in order, and waits with the retry
    shop.worker("-c", "2")
    assert shop.trace.wait_for(31), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
    assert retried.get(timeout=10) == 1
    begun = [mark.at for mark in shop.trace.read() if mark.kind == "begin"]
    assert len(begun) == 2
    assert begun[1] - begun[0] >= countdown_seconds


def test_what_was_cancelled_stays_off_when_the_worker_connects_anew(shop: Shop, proxy: FaultProxy) -> None:
    # Given a worker behind a proxy without shard 1
    worker = shop.worker("-c", "2", SHOP_BROKER=proxy.url)
    worker.wait_for("consuming g001, 4 queues")
    tell(shop, worker, "cancel_consumer", f"{shop.group}/1")
    assert wait_until(lambda: consumed(shop, worker) == [0, 2, 3], timeout_seconds=20)
    # When its connections are cut
    proxy.cut()
    worker.wait_for("consuming g001, 3 queues")
    # Then it still consumes the others only, until the shard is added
    assert consumed(shop, worker) == [0, 2, 3]
    tell(shop, worker, "add_consumer", f"{shop.group}/1")
    assert wait_until(lambda: consumed(shop, worker) == [0, 1, 2, 3], timeout_seconds=20)
    for number in range(40):
        shop.send("step", f"k{number}", number)
    assert shop.trace.wait_for(40), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_a_group_can_be_added_to_a_worker_that_was_started_without_it(shop: Shop) -> None:
    # Given messages that nobody consumes, and a worker of an ordinary queue
    for number in range(20):
        shop.send("step", f"k{number % 4}", number)
    worker = shop.worker("-c", "2", "-Q", f"{shop.group}-plain")
    # When the group is added
    tell(shop, worker, "add_consumer", shop.group)
    # Then it consumes the group
    assert shop.trace.wait_for(20), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
    assert wait_until(lambda: consumed(shop, worker) == [0, 1, 2, 3], timeout_seconds=20)
    assert [queue["name"] for queue in inspect(shop, worker, "active_queues")] == [f"{shop.group}-plain"]
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(f"{shop.group}-plain")


def test_a_shard_that_the_group_does_not_have_is_an_error_and_other_names_are_ordinary_queues(shop: Shop) -> None:
    # Given a worker
    worker = shop.worker("-c", "2")
    worker.wait_for("consuming g001, 4 queues")
    plain, other = f"{shop.group}-plain", f"{shop.group}-other"

    def queues() -> list[str]:
        return sorted(queue["name"] for queue in inspect(shop, worker, "active_queues"))

    # When a shard is named that the group does not have, then the reply says so, and nothing has changed
    for command in ("cancel_consumer", "add_consumer"):
        assert f"there is no {shop.group}.099" in tell(shop, worker, command, f"{shop.group}.099")["error"]
    assert consumed(shop, worker) == [0, 1, 2, 3]
    # When ordinary queues are added and cancelled, then they are consumed and not, as ever
    assert "ok" in tell(shop, worker, "add_consumer", other)
    assert wait_until(lambda: queues() == [other, plain], timeout_seconds=20)
    assert "ok" in tell(shop, worker, "cancel_consumer", plain)
    assert wait_until(lambda: queues() == [other], timeout_seconds=20)
    assert consumed(shop, worker) == [0, 1, 2, 3]
    with Connection(shop.broker_url) as connection:
        channel = connection.channel()
        for queue in (plain, other):
            channel.queue_delete(queue)
        channel.exchange_delete(other)


def tell_all(shop: Shop, command: str, queue: str) -> dict[str, str]:
    """Send all workers a command about a queue, and return what each did."""
    replies = shop.app.control.broadcast(
        command, arguments={"queue": queue}, reply=True, timeout=REPLY_SECONDS, limit=len(shop.workers)
    )
    return {name: reply["ok"] for each in replies for name, reply in each.items()}


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_broadcast_gives_a_shard_back_to_those_only_that_gave_it_up(shop: Shop, pool: str) -> None:
    # Given a worker of the group, one that was started without it, and one of a single shard
    all_of_it = shop.worker(*pool_options(pool))
    none_of_it = shop.worker(*pool_options(pool), "-X", shop.group)
    one_of_it = shop.worker(*pool_options(pool), "-Q", f"{shop.group}.001")
    assert wait_until(lambda: consumed(shop, all_of_it) == [0, 1, 2, 3], timeout_seconds=30)
    # When all are told to give a shard up, then each says whether it had it
    third = f"{shop.group}.003"
    assert tell_all(shop, "cancel_consumer", f"{shop.group}/3") == {
        all_of_it.name: f"no longer consuming from {third}",
        none_of_it.name: f"was not consuming from {third}",
        one_of_it.name: f"was not consuming from {third}",
    }
    assert wait_until(lambda: consumed(shop, all_of_it) == [0, 1, 2], timeout_seconds=30)
    # When all are told to add it, then who gave it up has it again, and the others say that they leave it alone
    replies = tell_all(shop, "add_consumer", f"{shop.group}/3")
    assert replies.pop(all_of_it.name) == f"add consumer {third}"
    assert all(reply.startswith(f"left {third} alone") for reply in replies.values()), replies
    assert wait_until(lambda: consumed(shop, all_of_it) == [0, 1, 2, 3], timeout_seconds=30)
    assert (consumed(shop, none_of_it), consumed(shop, one_of_it)) == ([], [1])
    # And the whole group comes back as each had it
    tell_all(shop, "cancel_consumer", shop.group)
    replies = tell_all(shop, "add_consumer", shop.group)
    assert replies[all_of_it.name] == f"add consumer {shop.group}"
    assert replies[one_of_it.name] == f"add consumer {shop.group}.001"
    assert replies[none_of_it.name].startswith(f"left {shop.group} alone")
    # When one is named, then it takes it, and from then on it is its own
    assert tell(shop, none_of_it, "add_consumer", f"{shop.group}/3") == {"ok": f"add consumer {third}"}
    assert wait_until(lambda: consumed(shop, none_of_it) == [3], timeout_seconds=30)
    tell_all(shop, "cancel_consumer", f"{shop.group}/3")
    assert tell_all(shop, "add_consumer", f"{shop.group}/3")[none_of_it.name] == f"add consumer {third}"


def test_a_near_miss_of_a_group_is_told_in_the_reply(shop: Shop) -> None:
    worker = shop.worker("-P", "solo", "-Q", shop.group)
    reply = tell(shop, worker, "add_consumer", f"{shop.group}x")["ok"]
    assert f"did you mean '{shop.group}'" in reply
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(f"{shop.group}x")
        connection.channel().exchange_delete(f"{shop.group}x")
