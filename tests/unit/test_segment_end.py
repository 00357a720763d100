"""The end of a segment in one queue: sealed, drained or reached, and told when the broker knows all it rests on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from celery_sharding import ShardGroup
from celery_sharding.keys import key_digest
from celery_sharding.layout.model import Segment
from celery_sharding.wire import CONTROL_HEADER
from celery_sharding.worker.place import Place
from celery_sharding.worker.shard.segment_end import SegmentEnd
from support.stand_ins import Services

QUEUE, MANIFEST = "shards.orders.g001.000", "shards.orders.manifest"


class Left:
    """A shard in which the messages of some keys are left."""

    def __init__(self) -> None:
        self.keys_left: set[str] = set()
        self.waits = False
        self.is_open = True
        self.acknowledged: list[int] = []

    def only_waits(self) -> bool:
        return self.waits

    def confirm_acknowledged(self) -> bool:
        return self.is_open

    def acknowledge_tag(self, tag: int) -> None:
        self.acknowledged.append(tag)


class Queue:
    """A queue whose end is told to a worker."""

    def __init__(self) -> None:
        self.services, self.left = Services(), Left()
        self.end = SegmentEnd(Place(ShardGroup("orders", 1), "g001", 0, QUEUE), self.services.values)

    def deliver(self, tag: int, control: str, nonce: str = "") -> None:
        message = SimpleNamespace(delivery_tag=tag, headers={CONTROL_HEADER: control, "nonce": nonce})
        self.end.on_control(control, message, self.left)

    def deliver_seal(self, tag: int) -> None:
        """Deliver the seal that was put into the queue last."""
        self.deliver(tag, "seal", self.seals[-1]["nonce"])

    @property
    def seals(self) -> list[dict[str, Any]]:
        return [written["application_headers"] for written in self.services.log.to(QUEUE)]

    def facts(self) -> list[dict[str, Any]]:
        """What was written to the manifest, once everything has happened."""
        self.services.calls.deliver()
        return self.services.log.to(MANIFEST)


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_an_end_with_nothing_before_it_is_sealed_and_drained_when_the_seal_comes_back(queue: Queue) -> None:
    # Given an end marker with nothing before it
    queue.deliver(1, "end")
    # When the seal comes back that was put behind it
    queue.deliver_seal(2)
    assert queue.left.acknowledged == []
    # Then the queue is drained, and both are acknowledged once that is confirmed
    assert [(fact["event"], fact["queue"]) for fact in queue.facts()] == [("drained", QUEUE)]
    assert queue.left.acknowledged == [1, 2]


def test_the_marker_stays_until_the_fact_is_confirmed(queue: Queue) -> None:
    # Given a queue that is drained, when the fact is written and not confirmed
    queue.services.log.is_up = False
    queue.deliver(1, "end")
    queue.deliver_seal(2)
    assert len(queue.facts()) == 1
    # Then the next owner would find the marker
    assert queue.left.acknowledged == []


def test_a_seal_of_another_worker_is_acknowledged_and_says_nothing(queue: Queue) -> None:
    queue.deliver(1, "end")
    queue.deliver(2, "seal", "another's")
    assert queue.left.acknowledged == [2]
    assert queue.facts() == []


def test_what_came_before_the_seal_is_run_first_and_sealed_anew(queue: Queue) -> None:
    # Given a sealed queue in which a message came before the seal
    queue.deliver(1, "end")
    queue.left.keys_left = {"k"}
    queue.deliver_seal(2)
    assert queue.left.acknowledged == [2]
    # When that has run
    queue.left.keys_left = set()
    queue.end.advance(queue.left)
    # Then another seal must come back before the queue is drained
    assert len(queue.seals) == 2
    assert queue.facts() == []
    queue.deliver_seal(3)
    assert [fact["event"] for fact in queue.facts()] == ["drained"]


def test_an_end_is_reached_when_what_is_left_has_only_waited_for_two_checks(queue: Queue) -> None:
    # Given an end marker behind a message that waits for its retry
    queue.left.keys_left, queue.left.waits = {"k"}, True
    queue.deliver(1, "end")
    # When it has been checked twice, then a seal is put, and not before
    queue.end.check_waiting(queue.left)
    assert queue.seals == []
    queue.end.check_waiting(queue.left)
    # And when it comes back, the end is reached but for the key
    queue.deliver_seal(2)
    (fact,) = queue.facts()
    assert (fact["event"], list(fact["keys"])) == ("reached", [key_digest("k")])


def test_a_key_that_is_left_behind_the_end_is_finished_once(queue: Queue) -> None:
    # Given a queue that was reached with two keys left
    queue.left.keys_left = {"a", "b"}
    queue.deliver(1, "end")
    unfinished = frozenset({(QUEUE, key_digest("a")), (QUEUE, key_digest("b"))})
    queue.end.learn(Segment("ring", 1, reached=frozenset({QUEUE}), unfinished=unfinished), queue.left)
    # When nothing of one is left
    queue.left.keys_left = {"b"}
    queue.end.advance(queue.left)
    queue.end.advance(queue.left)
    # Then it is finished, and said once
    assert [(fact["event"], fact["key"]) for fact in queue.facts()] == [("finished", key_digest("a"))]


def test_nothing_is_said_when_the_channel_is_lost_before_it_is_written(queue: Queue) -> None:
    # Given a queue that is drained, when its channel is lost before that is written
    queue.deliver(1, "end")
    queue.deliver_seal(2)
    queue.left.is_open = False
    # Then nothing is said, and nothing acknowledged
    assert queue.facts() == []
    assert queue.left.acknowledged == []


def test_nothing_is_said_of_a_channel_that_was_closed_meanwhile(queue: Queue) -> None:
    queue.deliver(1, "end")
    queue.deliver_seal(2)
    queue.end.reset()
    assert queue.facts() == []
    assert queue.left.acknowledged == []


def test_a_worker_that_stands_by_leaves_the_marker_to_the_next(queue: Queue) -> None:
    # Given an end marker, when the worker becomes a bystander of the group
    queue.deliver(1, "end")
    queue.end.stop()
    # Then it takes no control message any more
    queue.deliver_seal(2)
    queue.deliver(3, "end")
    assert queue.facts() == []
    assert queue.left.acknowledged == []
