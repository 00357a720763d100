"""A watcher shows what a snapshot shows, for as long as it is asked, and says so when it cannot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.layout.cleanup import delete_group
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.watcher import View, Watcher
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import append
from celery_sharding.testing import FaultProxy
from celery_sharding.topology import Names

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def watcher(proxy: FaultProxy, group_name: str) -> Iterator[Watcher]:
    watcher = Watcher(lambda: Connection(proxy.url), [group_name], every_seconds=0.1)
    yield watcher
    watcher.stop()


def wait_for(watcher: Watcher, condition: Callable[[View], bool]) -> View:
    view = watcher.view
    for _ in range(300):
        if condition(view):
            return view
        view = watcher.wait_newer(view, timeout_seconds=0.2)
    raise AssertionError(view)


def declare(broker_url: str, group: str, watcher: Watcher | None = None) -> None:
    """Declare the group, and then begin to watch it."""
    ensure_group(lambda: Connection(broker_url), ShardGroup(group, shards=2), owner="test")
    if watcher is not None:
        watcher.start()


def test_it_shows_a_group_that_is_declared_while_it_watches(watcher, broker_url, group_name):
    watcher.start()
    wait_for(watcher, lambda view: view.snapshot is not None and not view.snapshot.groups[0].declared)

    declare(broker_url, group_name)

    view = wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)
    assert len(view.snapshot.groups[0].shards) == 2


def test_it_shows_what_a_snapshot_shows_once_the_journal_says_more(watcher, broker_url, group_name, connection):
    names = Names(group_name)
    declare(broker_url, group_name, watcher)
    wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)

    with brief_channel(connection) as channel:
        owned = {names.shard(1, 0): {"index": 0, "since": 1.0, "held": 3, "running": 1, "lag_seconds": 4.0}}

        append(
            channel,
            names.journal,
            {"event": "vitals", "at": time.time(), "by": "w@test", "generation": 1, "owned": owned, "standby": []},
        )

    view = wait_for(watcher, lambda view: view.snapshot.groups[0].shards[0].owner == "w@test")
    assert view.snapshot.groups == read_snapshot(connection, [group_name]).groups


def test_a_lost_broker_is_told_and_the_last_snapshot_stays(watcher, proxy, broker_url, group_name):
    declare(broker_url, group_name, watcher)
    before = wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)

    proxy.refuse()

    lost = wait_for(watcher, lambda view: bool(view.error))
    assert lost.snapshot is not None
    assert lost.snapshot.taken_at >= before.snapshot.taken_at

    proxy.heal()
    wait_for(watcher, lambda view: not view.error and view.snapshot.taken_at > lost.snapshot.taken_at)


def test_a_group_that_is_removed_and_declared_anew_while_it_watches_is_seen_as_it_is_now(
    watcher, broker_url, group_name, connection
):
    # Given a group that was switched: its manifest is longer than a new one
    declare(broker_url, group_name, watcher)
    names = Names(group_name)
    wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)
    with brief_channel(connection) as channel:
        drained = {"event": "drained", "segment": "limbo001", "queue": names.limbo(1), "by": "w", "at": time.time()}
        append(channel, names.manifest, drained)
    wait_for(watcher, lambda view: not view.snapshot.groups[0].earlier)
    # When it is removed, and declared with another number of shards
    delete_group(connection, group_name)
    ensure_group(lambda: Connection(broker_url), ShardGroup(group_name, shards=3), owner="test")
    # Then the new one is shown
    view = wait_for(watcher, lambda view: not view.error and len(view.snapshot.groups[0].shards) == 3)
    assert [row.state for row in view.snapshot.groups[0].shards] == ["waiting"] * 3
    # And what happens to it
    with brief_channel(connection) as channel:
        append(channel, names.manifest, drained)
    wait_for(watcher, lambda view: not view.snapshot.groups[0].earlier)


def test_rates_come_from_its_own_counts_and_the_words_of_one_owner(watcher, broker_url, group_name, connection):
    # Given an owner that holds all that it may, and settles 10 a second
    names = Names(group_name)
    declare(broker_url, group_name, watcher)
    queue, since = names.shard(1, 0), time.time() - 60
    with brief_channel(connection) as channel:
        # When it speaks once a second, in its own time
        for second in range(5):
            counters = {"delivered": 1_000 + 10 * second}
            facts = {"index": 0, "since": since, "held": 200, "running": 1, "lag_seconds": 9.0, "prefetch": 200}
            facts |= {"behind_seconds": 0.0, "counters": counters}
            event = {
                "event": "vitals",
                "at": time.time() - 4 + second,
                "by": "w@test",
                "generation": 1,
                "owned": {queue: facts},
                "standby": [],
            }
            append(channel, names.journal, event)
    # Then the rates are known, and what waits does not get less
    view = wait_for(watcher, lambda view: view.snapshot is not None and first_out_rate(view) is not None)
    row = view.snapshot.groups[0].shards[0]
    assert row.out_rate == pytest.approx(10.0, rel=0.01)
    assert row.in_rate == pytest.approx(10.0, rel=0.01)
    assert row.clear_seconds is None


def first_out_rate(view: View) -> float | None:
    rows = view.snapshot.groups[0].shards
    return rows[0].out_rate if rows else None


def test_neither_a_receiver_nor_a_connection_that_raises_ends_it(broker_url, group_name, connection):
    # Given settings that cannot be used at first, and a receiver that is broken
    attempts, received = [], []

    def connect() -> Connection:
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("no such setting")
        return Connection(broker_url)

    class Broken:
        def note(self, group: str, event: object) -> None:
            received.append(event)
            raise KeyError("a receiver")

    declare(broker_url, group_name)
    with brief_channel(connection) as channel:
        append(channel, Names(group_name).journal, {"event": "x"})
    watcher = Watcher(connect, [group_name], every_seconds=0.1, sink=Broken())
    watcher.start()
    # Then the first is told, and it goes on
    wait_for(watcher, lambda view: view.error == "no such setting")
    wait_for(watcher, lambda view: not view.error and view.snapshot.groups[0].generation == 1)
    assert received
    watcher.stop()


def test_a_forked_child_is_told_that_nobody_watches_there(watcher, broker_url, group_name):
    declare(broker_url, group_name, watcher)
    seen = wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)

    read, write = os.pipe()
    child = os.fork()
    if not child:
        view = watcher.wait_newer(watcher.view, timeout_seconds=60)
        os.write(write, f"{view.snapshot is not None} {view.error}".encode())
        os._exit(0)
    os.waitpid(child, 0)

    assert os.read(read, 1_000).decode().startswith("True the process was forked")
    # And the parent's connection is as it was
    wait_for(watcher, lambda view: not view.error and view.snapshot.taken_at > seen.snapshot.taken_at)
