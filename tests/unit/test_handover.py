"""A shard that is given up: when nothing of it runs, and what the next owner must know is with the broker."""

from __future__ import annotations

import pytest

from celery_sharding import ShardGroup
from celery_sharding.worker.balance.handover import Handover
from celery_sharding.worker.place import Place
from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.shard.shard import Shard
from unit.stand_ins import Connection, Services

QUEUE, ATTEMPTS = "shards.orders.g001.000", "shards.orders.attempts"


class Group:
    """A group of one shard, which is consumed."""

    def __init__(self) -> None:
        self.services, self.connection = Services(), Connection()
        self.attempts = Attempts(ATTEMPTS, self.services.log)
        self.handover = Handover(self.attempts, self.services.values)
        place = Place(ShardGroup("orders", 1), "g001", 0, QUEUE)
        self.shard = Shard(place, host=self, services=self.services.values)
        self.shard.open(self.connection, 10)

    def close_shard(self, shard: Shard) -> None:
        shard.close()

    def note_lost(self, shard: Shard) -> None:
        raise AssertionError

    def stand_by(self, protocol: int) -> None:
        raise AssertionError

    @property
    def is_open(self) -> bool:
        self.services.calls.deliver()
        return self.connection.channels[QUEUE].is_open

    def run(self, task_id: str) -> None:
        self.connection.channels[QUEUE].deliver_task(task_id, task_id)


@pytest.fixture
def group() -> Group:
    return Group()


def test_a_standby_gives_its_shard_up_at_once(group: Group) -> None:
    group.handover.begin(group.shard)
    assert not group.is_open


def test_an_owner_lets_what_runs_end_and_starts_nothing_more(group: Group) -> None:
    # Given an owner with a run
    group.run("a")
    # When it gives the shard up, and another message comes
    group.handover.begin(group.shard)
    group.run("b")
    group.services.calls.fire()
    # Then that does not start, and the shard is kept until the run has ended
    assert group.services.begun == ["a"]
    assert group.is_open
    group.services.finish()
    group.services.calls.fire()
    assert not group.is_open
    # And what has not run is not acknowledged
    assert group.connection.channels[QUEUE].acknowledged == [1]


def test_a_shard_is_closed_when_what_the_next_owner_must_know_is_confirmed(group: Group) -> None:
    # Given an owner of which nothing runs, and a broker that confirms nothing for a while
    group.run("a")
    group.services.finish()
    group.services.log.is_up = False
    # When it gives the shard up, then it keeps it until all that was written before is confirmed
    group.handover.begin(group.shard)
    assert group.is_open
    group.services.log.confirm()
    assert not group.is_open


def test_a_shard_that_is_taken_back_goes_on(group: Group) -> None:
    # Given an owner that lets its last run end
    group.run("a")
    group.handover.begin(group.shard)
    # When it is to keep the shard
    group.handover.take_back(group.shard)
    group.run("b")
    # Then it starts again, and stays open
    group.services.finish()
    group.services.calls.fire()
    assert group.services.begun == ["b"]
    assert group.is_open
    assert group.shard not in group.handover


def test_what_is_forgotten_is_not_closed(group: Group) -> None:
    # Given a shard that is being recorded, when the connection is lost before that is confirmed
    group.run("a")
    group.services.finish()
    group.services.log.is_up = False
    group.handover.begin(group.shard)
    group.handover.forget()
    # Then the late confirm closes nothing
    group.services.log.confirm()
    assert group.is_open
