"""A watcher shows what a snapshot shows, for as long as it is asked, and says so when it cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.admin.snapshot import read_snapshot
from celery_sharding.admin.switch import ensure_group
from celery_sharding.admin.watcher import View, Watcher
from celery_sharding.journal import vitals_event
from celery_sharding.streams import append
from celery_sharding.testing import FaultProxy
from celery_sharding.topology import Names, brief_channel

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def watcher(proxy: FaultProxy, group_name: str) -> Iterator[Watcher]:
    watcher = Watcher(lambda: Connection(proxy.url), [group_name], every_seconds=0.1)
    watcher.start()
    yield watcher
    watcher.stop()


def wait_for(watcher: Watcher, condition: Callable[[View], bool]) -> View:
    view = watcher.view
    for _ in range(300):
        if condition(view):
            return view
        view = watcher.wait_newer(view, timeout_seconds=0.2)
    raise AssertionError(view)


def declare(broker_url: str, group: str) -> None:
    ensure_group(lambda: Connection(broker_url), ShardGroup(group, shards=2), owner="test")


def test_it_shows_a_group_that_is_declared_while_it_watches(watcher, broker_url, group_name):
    wait_for(watcher, lambda view: view.snapshot is not None and not view.snapshot.groups[0].declared)

    declare(broker_url, group_name)

    view = wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)
    assert len(view.snapshot.groups[0].shards) == 2


def test_it_shows_what_a_snapshot_shows_once_the_journal_says_more(watcher, broker_url, group_name, connection):
    names = Names(group_name)
    declare(broker_url, group_name)
    wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)

    with brief_channel(connection) as channel:
        owned = {names.shard(1, 0): {"index": 0, "since": 1.0, "held": 3, "running": 1, "lag_seconds": 4.0}}

        append(channel, names.journal, vitals_event("w@test", 1, owned=owned, standby=[], at=time.time()))

    view = wait_for(watcher, lambda view: view.snapshot.groups[0].shards[0].owner == "w@test")
    assert view.snapshot.groups == read_snapshot(connection, [group_name]).groups


def test_a_lost_broker_is_told_and_the_last_snapshot_stays(watcher, proxy, broker_url, group_name):
    declare(broker_url, group_name)
    before = wait_for(watcher, lambda view: view.snapshot is not None and view.snapshot.groups[0].generation == 1)

    proxy.refuse()

    lost = wait_for(watcher, lambda view: bool(view.error))
    assert lost.snapshot is not None
    assert lost.snapshot.taken_at >= before.snapshot.taken_at

    proxy.heal()
    wait_for(watcher, lambda view: not view.error and view.snapshot.taken_at > lost.snapshot.taken_at)
