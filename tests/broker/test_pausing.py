"""Pausing shards and groups under work: in force in every worker, and through restarts, with the order kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from kombu import Connection
from publishing import Load
from shops import Shop

from celery_sharding import ShardGroup
from celery_sharding.admin import pausing
from celery_sharding.admin.history import read_history
from celery_sharding.admin.snapshot import ShardStatus, read_snapshot
from celery_sharding.admin.steps import begin_reshard
from celery_sharding.admin.switch import ensure_group
from celery_sharding.errors import TopologyError, UnknownShard
from celery_sharding.manifest import load
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.order import Mark
from celery_sharding.testing.processes import wait_until

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
            replies.append(inspection._request("shards"))
            return replies[-1] is not None

        assert wait_until(ask, timeout_seconds=40), f"{worker.name} does not answer"
        return replies[-1][worker.name][self._shop.group]  # type: ignore[no-any-return]

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


def starts(shop: Shop) -> list[Mark]:
    return [mark for mark in shop.trace.read() if mark.kind == "start"]


def test_a_solo_worker(shop: Shop, operator: Operator) -> None:
    worker = shop.worker("-P", "solo", wait_seconds=40)
    for number in range(200):
        shop.send("step", f"k{number % 8}", number, seconds=0.1)
    assert shop.trace.wait_for(10)
    assert operator.pause()
    import time
    at = time.time()
    print(worker.name)
    time.sleep(10)
    late = [m.at - at for m in starts(shop)][-1]
    assert late < 1, late
