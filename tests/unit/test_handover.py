"""A shard that is given up: when nothing of it runs, and what the next owner must know is with the broker."""

from __future__ import annotations

import pytest

from celery_sharding.worker.balance.handover import Handover
from support.stand_ins import Owner


class Group(Owner):
    """A group of one shard, which is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.handover = Handover(self.attempts, self.services.values)

    @property
    def is_open(self) -> bool:
        self.services.calls.deliver()
        return self.channel.is_open

    def run(self, task_id: str) -> None:
        self.channel.deliver_task(task_id, task_id)


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
    assert group.channel.acknowledged == [1]


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
