"""The balancing of one group in one worker: what it tells, what it hears, and what it gives up for it."""

from __future__ import annotations

import time

import pytest

from celery_sharding import ShardGroup
from celery_sharding.dedup.waiting import CLAIM, WaitInLane
from celery_sharding.journal.events import Counted, Handover, ShardVitals, Vitals
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.topology import Names
from celery_sharding.worker.consume.group import GroupConsumer
from support.stand_ins import Connection, Services

ORDERS = Names("orders")
Q0, Q1 = ORDERS.shard(1, 0), ORDERS.shard(1, 1)
LAYOUT = Layout(segments=(Segment("ring", 1, shards=2),), generation=1, shards=2)


class Worker:
    """A worker that consumes a group of two shards, and hears its journal."""

    def __init__(self, *, version: str = "4.0.5", hold_seconds: float = 900.0) -> None:
        self.services, self.connection = Services(hold_seconds=hold_seconds), Connection(version)
        self.group = GroupConsumer(ShardGroup("orders", 2), None, host=self, services=self.services.values)
        self.group.open(self.connection, LAYOUT)

    def repair_soon(self) -> None:
        raise AssertionError

    def kill_orphans(self) -> None:
        raise AssertionError

    def hear(self, event: Vitals | Handover) -> None:
        self.services.log.tails[ORDERS.journal].tell(event.as_dict())
        self.services.calls.deliver()

    def hear_owner(self, queue: str) -> None:
        """Hear that another worker owns a queue."""
        vitals = ShardVitals(owner="other", at=1.0, counted=Counted(0.0), held=0, running=0)
        self.hear(Vitals("other", 1, {queue: vitals}, [], at=1.0))

    def tick(self, now: float) -> None:
        self.group.tick(now)
        self.services.calls.deliver()

    def probed(self) -> list[str]:
        """Return the queues that were probed since the last call."""
        written, self.services.log.written = self.services.log.written, []
        return [queue for queue, properties in written if "application_headers" in properties]


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_a_worker_tells_once_a_second_what_it_owns_and_stands_by_for(worker: Worker) -> None:
    # Given the owner of one shard, which has run a message and holds two
    channel = worker.connection.channels[Q0]
    for task_id in ("a", "b", "c"):
        channel.deliver_task(task_id, "key")
    worker.services.finish()
    # When it ticks
    worker.tick(1000.0)
    # Then its vitals say so
    told = Vitals.parse(worker.services.log.to(ORDERS.journal)[-1])
    assert told is not None
    assert (list(told.owned), list(told.standby)) == ([Q0], [Q1])
    vitals = told.owned[Q0]
    assert (vitals.held, vitals.running, vitals.counters) == (2, 1, {"delivered": 3, "done": 1})


def test_a_queue_that_nobody_says_he_owns_is_probed_every_few_seconds(worker: Worker) -> None:
    # Given a worker that has probed both queues when it opened them
    assert worker.probed() == [Q0, Q1]
    # When another says that it owns one, then only the other is probed, and not each second
    worker.hear_owner(Q1)
    worker.tick(time.time() + 5)
    assert worker.probed() == [Q0]
    worker.tick(time.time() + 6)
    assert worker.probed() == []


def test_a_standby_steps_back_when_a_queue_is_offered_to_another(worker: Worker) -> None:
    # Given two standbys of a queue
    before = dict(worker.connection.channels)
    # When its owner offers it to the other one
    worker.hear(Handover(Q0, "owner", "offered", to="other"))
    # Then this one closes its channel and opens another, behind it in the broker's line
    assert not before[Q0].is_open
    assert worker.connection.channels[Q0].is_open
    assert worker.connection.channels[Q1] is before[Q1]
    # And stays where it is if it is the one
    worker.hear(Handover(Q1, "owner", "offered", to="w@test"))
    assert worker.connection.channels[Q1] is before[Q1]


def test_an_owner_does_not_step_back(worker: Worker) -> None:
    channel = worker.connection.channels[Q0]
    channel.deliver_task("a", "key")
    worker.hear(Handover(Q0, "other", "offered", to="third"))
    assert worker.connection.channels[Q0] is channel


def test_who_holds_nothing_believes_another_that_says_it_owns_the_queue(worker: Worker) -> None:
    # Given a worker that owned both queues, and holds a message of one
    for queue in (Q0, Q1):
        worker.connection.channels[queue].deliver_task(queue, "key")
    worker.services.finish()
    # When another says that it owns them
    worker.hear_owner(Q0)
    worker.hear_owner(Q1)
    # Then that is so for the one of which nothing is held
    assert worker.group.roles() == {Q0: "standby", Q1: "owner"}


@pytest.mark.parametrize(("version", "is_recycled"), [("3.10.8", True), ("3.12.0", False), ("4.0.5", False)])
def test_a_shard_is_given_back_before_the_broker_closes_its_channel_over_a_message_held_for_long(
    version: str, is_recycled: bool
) -> None:
    # Given a message that waits for its retry for as long as a worker may hold it
    worker = Worker(version=version, hold_seconds=0.0)
    channel = worker.connection.channels[Q0]
    channel.deliver_task("a", "key")
    worker.services.executor.wait(worker.services.pool.begun.pop(), WaitInLane(CLAIM, "held elsewhere"))
    # When the worker balances, where it cannot ask the broker for more time
    worker.tick(1000.0)
    # Then it opens another channel, to which the message comes again
    assert channel.is_open is not is_recycled
    assert worker.connection.consumed == ["g001.000", "g001.001"]
