"""Pausing shards and groups under work: in force in every worker, and through restarts, with the order kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.errors import TopologyError, UnknownShard
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.manifest import load
from celery_sharding.layout.switch import begin_reshard
from celery_sharding.monitoring.history import read_history
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.status import ShardStatus
from celery_sharding.operations import pause as pausing
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.order import Mark
from celery_sharding.testing.processes import wait_until
from support.publishers import Load
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)


class Operator:
    """Pauses and resumes a shop's group, and looks at it."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.group = ShardGroup(shop.group, shards=4)

    def connect(self) -> Connection:
        return Connection(self._shop.broker_url)

    def pause(self, index: int | None = None, *, by: str = "ann@test") -> bool:
        return pausing.pause(self.connect, self.group, index, by=by)

    def resume(self, index: int | None = None) -> bool:
        return pausing.resume(self.connect, self.group, index, by="ann@test")

    def rows(self) -> tuple[ShardStatus, ...]:
        with self.connect() as connection:
            return read_snapshot(connection, [self._shop.group]).groups[0].shards

    def roles(self, worker: WorkerNode) -> dict[str, str]:
        """Return what `celery inspect shards` says of the group's queues in a worker."""
        replies: list[Any] = []

        def ask() -> bool:
            inspection = self._shop.app.control.inspect([worker.name], timeout=10, limit=1)
            with contextlib.suppress(ConnectionError):  # a connection in the pool may be from before a restart
                replies.append(inspection._request("shards"))
            return bool(replies) and replies[-1] is not None

        assert wait_until(ask, timeout_seconds=40), f"{worker.name} does not answer"
        return replies[-1][worker.name][self._shop.group]  # type: ignore[no-any-return]

    def role(self, worker: WorkerNode, index: int) -> str | None:
        """Return what a worker is to a live shard; None if it has none of that index."""
        found = [role for queue, role in self.roles(worker).items() if queue.endswith(f".{index:03d}")]
        return found[-1] if found else None

    def wait_for_roles(self, worker: WorkerNode, *roles: str) -> None:
        """Wait until the live shards have these roles in a worker, in the order of their index."""
        seen: list[list[str]] = []

        def look() -> bool:
            seen.append([role for _, role in sorted(self.roles(worker).items())])
            return seen[-1] == list(roles)

        assert wait_until(look, timeout_seconds=30), seen[-1]


@pytest.fixture
def operator(shop: Shop) -> Operator:
    return Operator(shop)


def starts_between(shop: Shop, since: float, until: float) -> list[Mark]:
    return [mark for mark in shop.trace.read() if mark.kind == "start" and since < mark.at < until]


def test_a_shard_and_then_the_group_stand_still_under_load_and_go_on_in_order(shop: Shop, operator: Operator) -> None:
    # Given two workers that share a group under load
    workers = [shop.worker("-c", "2"), shop.worker("-c", "2")]
    with Load(shop) as load:
        load.wait_for_more(20)
        # When a shard is paused, then nobody consumes it, its messages wait, and the others go on
        assert operator.pause(2)
        for worker in workers:
            assert wait_until(lambda w=worker: operator.role(w, 2) == "paused", timeout_seconds=20)
        quiet_at = time.time()
        load.wait_for_more(60)
        [paused] = [row for row in operator.rows() if row.index == 2]
        assert (paused.owner, paused.standbys) == (None, ())
        assert paused.ready
        # When it is resumed, then what waited runs
        seen_at = time.time()
        assert operator.resume(2)
        load.wait_for_more(60)
        assert wait_until(lambda: None not in shop.owners(), timeout_seconds=20), shop.owners()
        ran = {mark.key for mark in starts_between(shop, quiet_at, seen_at)}
        stood = {mark.key for mark in starts_between(shop, seen_at, time.time())} - ran
        assert ran
        assert stood
        # When the group is paused, then nothing starts at all
        assert operator.pause()
        for worker in workers:
            operator.wait_for_roles(worker, *["paused"] * 4)
        quiet_at, published = time.time(), len(shop.published)
        assert wait_until(lambda: len(shop.published) > published + 60, timeout_seconds=30)
        assert starts_between(shop, quiet_at, time.time()) == []
        # When it is resumed, then each worker has its part of it again
        assert operator.resume()
        load.wait_for_more(60)
        assert wait_until(
            lambda: sorted(map(shop.owners().count, (w.name for w in workers))) == [2, 2], timeout_seconds=40
        ), shop.owners()
    # Then nothing is lost, repeated, overlapping or out of order
    assert shop.trace.wait_for(load.number), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_what_runs_may_end_a_killed_worker_finds_the_pause_again_and_a_retry_goes_on_waiting(
    shop: Shop, operator: Operator
) -> None:
    # Given an owner with a long task and its successors, a task whose retry is due soon, and a standby without shard 0
    owner = shop.worker("-c", "2")
    others = [f"{shop.group}/{index}" for index in (1, 2, 3)]
    standby = shop.worker("-c", "2", "-Q", ",".join(others))
    retried = shop.send("again", "retried", 1, times=1, countdown=3)
    shop.send("step", "long", 1, seconds=4)
    for number in range(2, 20):
        shop.send("step", "long", number)
    assert shop.trace.wait_for(1, kind="begin")
    assert shop.trace.wait_for(1, kind="start")
    # When the group is paused, then the owner leaves the long task's shard when it has ended, and starts nothing more
    assert operator.pause()
    assert wait_until(lambda: "leaving" in operator.roles(owner).values(), timeout_seconds=10)
    operator.wait_for_roles(owner, *["paused"] * 4)
    operator.wait_for_roles(standby, *["paused"] * 3)
    assert [mark.kind for mark in shop.trace.read()] == ["begin", "start", "end"]
    # When it is killed and started again, then the pause is in force
    owner.kill()
    owner.start()
    operator.wait_for_roles(owner, *["paused"] * 4)
    assert len(shop.trace.read()) == 3
    # When shard by shard of a paused group is resumed, then that is refused, since the group stays paused
    with pytest.raises(TopologyError, match=f"shards resume {shop.group}"):
        operator.resume(0)
    # When the group is, then all go on, but for what a selection excludes
    assert operator.resume()
    assert shop.trace.wait_for(20), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
    assert retried.get(timeout=10) == 1
    assert len(operator.roles(standby)) == 3


def test_a_solo_worker_starts_nothing_more_though_it_holds_many(shop: Shop, operator: Operator) -> None:
    # Given a worker that runs the tasks in its main thread, and holds what it was delivered
    worker = shop.worker("-P", "solo")
    for number in range(40):
        shop.send("step", f"k{number % 8}", number, seconds=0.15)
    assert shop.trace.wait_for(3)
    # When the group is paused, then it leaves it long before it is done
    assert operator.pause()
    operator.wait_for_roles(worker, *["paused"] * 4)
    assert shop.trace.count() < 40
    # And goes on when it is resumed
    assert operator.resume()
    assert shop.trace.wait_for(40), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_a_paused_shard_stays_paused_when_the_broker_restarts_and_the_chain_waits_for_it(
    shop: Shop, operator: Operator, restart_broker: Callable[[], None]
) -> None:
    # Given a paused shard with messages
    worker = shop.worker("-c", "2")
    assert operator.pause(1)
    assert wait_until(lambda: operator.role(worker, 1) == "paused", timeout_seconds=20)
    for number in range(40):
        shop.send("step", f"k{number % 20}", number)
    assert wait_until(lambda: (operator.rows()[1].ready or 0) + shop.trace.count() == 40, timeout_seconds=30)
    waiting = 40 - shop.trace.count()
    assert waiting
    # When the broker restarts, and loses its ring, as one does that keeps it in memory only
    restart_broker()
    with operator.connect() as connection, brief_channel(connection) as channel:
        channel.exchange_delete(shop.names.ring(1))
    shop.send("step", "k0", 40)
    worker.wait_for("waits for the paused")
    # Then nothing of it has run, nor what came later
    assert operator.role(worker, 1) == "paused"
    assert shop.trace.count() == 40 - waiting
    # When it is resumed, then all run in order
    assert operator.resume(1)
    assert shop.trace.wait_for(41), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_two_operators_at_once_and_what_cannot_be_paused(shop: Shop, operator: Operator) -> None:
    # Given a group that nobody has declared, when it is paused, then that is refused, and nothing is left of it
    for change in (operator.pause, operator.resume):
        with pytest.raises(TopologyError, match="not declared yet"):
            change()
    with operator.connect() as connection:
        assert load(connection, shop.names).offset == -1
        # Given the group, when many pause the same at once, then one of them does
        ensure_group(operator.connect, operator.group, owner="test")
        with ThreadPoolExecutor(4) as executor:
            changed = list(executor.map(lambda number: operator.pause(3, by=f"operator {number}"), range(4)))
        assert sorted(changed) == [False, False, False, True]
        # Then the history names the one, and once
        paused = [entry for entry in read_history(connection, shop.group) if entry.event == "pause"]
        assert [(entry.what, entry.result) for entry in paused] == [(f"{shop.group}/3 paused", "done")]
        assert paused[0].by == f"operator {changed.index(True)}"
        # When a shard is named that it does not have, then nothing changes
        layout = load(connection, shop.names)
        with pytest.raises(UnknownShard, match="shards 0 to 3"):
            operator.pause(4)
        # When it is to get another number of shards, then the paused one is in the way, since it would not drain
        with pytest.raises(TopologyError, match="the shards 3 of group"):
            begin_reshard(connection, operator.group, layout, shards=8, by="test")
        assert load(connection, shop.names) == layout
        # When the group is resumed, then its shards are, and no more is to be resumed
        assert [operator.resume(), operator.resume(3), operator.resume()] == [True, False, False]
