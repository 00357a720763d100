"""The groups of a worker: made ready on the broker, repaired in a thread, opened by the thread that reads."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from celery_sharding import ShardGroup
from celery_sharding.errors import BrokerUnavailable, ProtocolTooOld, UnknownShard
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.worker.consume.groups import Groups
from support.stand_ins import Connection, Services

LAYOUT = Layout(segments=(Segment("ring", 1, shards=2),), generation=1, shards=2, through=3, offset=3)


class Worker:
    """A worker that may consume two groups, of two shards each, and the broker they are on."""

    def __init__(self, **selection: frozenset[int] | None) -> None:
        self.services, self.connection = Services(), Connection()
        self.is_stopping = False
        self.error: Exception | None = None
        self._ensured = threading.Semaphore(0)
        settings = SimpleNamespace(groups={name: ShardGroup(name, 2) for name in ("orders", "mails")})
        app = SimpleNamespace(sharding=SimpleNamespace(settings=settings))
        consumer = SimpleNamespace(app=app, connection=self.connection)
        self.groups = Groups(consumer, self, selection, host=self, services=self.services.values)

    def kill_orphans(self) -> None: ...

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        self._ensured.release()
        if self.error is not None:
            raise self.error
        return LAYOUT

    def join_group(self, consumer: object, group: ShardGroup) -> Connection:
        return self.connection

    def start(self) -> None:
        self.groups.prepare()
        self.groups.open()

    def finish_repair(self) -> None:
        """Wait until the broker was asked by the thread, let that end, and what follows happen."""
        assert self._ensured.acquire(timeout=10)
        for thread in threading.enumerate():
            if thread.name == "shards-repair":
                thread.join(10)
        self.services.calls.deliver()

    @property
    def consumed(self) -> list[str]:
        queues = (queue for queue, channel in self.connection.channels.items() if channel.is_open)
        return sorted(queue.removeprefix("shards.") for queue in queues)


def test_a_worker_consumes_what_was_selected_for_it() -> None:
    worker = Worker(orders=frozenset({1}), mails=None)
    worker.start()
    assert worker.consumed == ["mails.g001.000", "mails.g001.001", "orders.g001.001"]
    assert worker.groups.indexes() == {"orders": [1], "mails": [0, 1]}
    assert worker.groups.is_consuming


def test_celery_connects_again_when_the_broker_is_away() -> None:
    worker = Worker(orders=None)
    worker.error = BrokerUnavailable("nobody answers")
    with pytest.raises(ConnectionResetError, match="nobody answers"):
        worker.groups.prepare()


def test_a_group_of_a_newer_protocol_is_left_alone_and_the_others_are_consumed() -> None:
    # Given a worker whose group asks for a newer protocol
    worker = Worker(orders=None)
    worker.error = ProtocolTooOld("too old", group="orders", needed=99, known=1)
    # When it starts, then it consumes nothing of it, and is not unwell for that
    worker.start()
    assert worker.consumed == []
    assert worker.groups.is_bystander
    assert worker.groups.is_consuming
    assert worker.groups.roles() == {"orders": {"shards.orders": "bystander, needs protocol 99"}}


def test_what_is_cancelled_stays_off_after_a_reconnect() -> None:
    # Given a worker whose shard was cancelled
    worker = Worker(orders=None)
    worker.start()
    assert worker.groups.cancel_shards("orders", 0)
    assert not worker.groups.cancel_shards("orders", 0)
    worker.services.calls.deliver()
    assert worker.consumed == ["orders.g001.001"]
    # When it connects again
    worker.groups.drop()
    worker.connection.channels.clear()
    worker.start()
    # Then it consumes the other one only
    assert worker.consumed == ["orders.g001.001"]
    with pytest.raises(UnknownShard):
        worker.groups.cancel_shards("orders", 7)


def test_who_was_not_named_takes_back_only_what_it_was_started_with() -> None:
    # Given a worker that was started with one shard
    worker = Worker(orders=frozenset({1}))
    worker.start()
    # When all are told to add the group, and then this one by its name
    assert worker.groups.add_shards("orders", None, by_name=False) == {1}
    assert worker.groups.add_shards("orders", 0, by_name=False) == frozenset()
    assert worker.groups.add_shards("orders", 0, by_name=True) == {0}
    worker.services.calls.deliver()
    # Then it takes the other shard when it is named
    assert worker.consumed == ["orders.g001.000", "orders.g001.001"]


def test_a_group_that_is_added_is_made_ready_in_a_thread_and_opened_by_the_one_that_reads() -> None:
    # Given a worker of one group, when it is told to take another
    worker = Worker(orders=None)
    worker.start()
    worker.groups.add_shards("mails", None, by_name=True)
    # Then it consumes that when the broker has it
    for _ in range(3):  # one when it was prepared, and one a group
        worker.finish_repair()
    assert worker.consumed == ["mails.g001.000", "mails.g001.001", "orders.g001.000", "orders.g001.001"]


def test_a_worker_that_stops_opens_nothing_that_was_added() -> None:
    worker = Worker(orders=frozenset())
    worker.start()
    worker.is_stopping = True
    worker.groups.add_shards("mails", None, by_name=True)
    worker.finish_repair()
    assert worker.consumed == []


def test_a_repair_that_fails_is_no_end_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(orders=None, mails=None)
    worker.start()
    worker.error = BrokerUnavailable("nobody answers")
    worker.groups.repair_soon()
    for _ in range(4):
        worker.finish_repair()
    assert [record.args for record in caplog.records if "could not be checked" in record.msg] == [
        ("orders", worker.error),
        ("mails", worker.error),
    ]
