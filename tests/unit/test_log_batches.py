"""Batches of a worker's writes: who is told what, and what is written again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from amqp.exceptions import PreconditionFailed

from celery_sharding.worker.log import Write
from celery_sharding.worker.log_batches import BatchWriter
from support.confirming import Channel, Node, Told


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def told() -> Told:
    return Told()


def once(node: Node, queue: str, act: Callable[[Channel, int], None]) -> None:
    """Let the node do something else with the first message to a queue; it confirms the rest."""
    left = [queue]

    def answer(channel: Channel, tag: int, to: str) -> None:
        if to in left:
            left.remove(to)
            act(channel, tag)
        else:
            channel.ack(tag)

    node.answer = answer


def test_each_write_is_told_when_it_is_stored(node, told):
    # Given three writes
    waiting = deque(told.write(queue) for queue in "abc")
    # When they are written
    BatchWriter(node, told).write_from(waiting)
    # Then each was told
    assert told.stored == ["a", "b", "c"]
    assert not waiting


def test_what_is_nacked_is_written_again_on_another_connection(node, told):
    # Given a broker that nacks the second of three writes
    once(node, "b", lambda channel, tag: channel.nack(tag))
    waiting = deque(told.write(queue) for queue in "abc")
    writer = BatchWriter(node, told)
    # When the batch is written
    writer.write_from(waiting)
    # Then the others are stored, and it waits alone
    assert told.stored == ["a", "c"]
    assert [write.queue for write in waiting] == ["b"]
    # And it is stored on a new connection
    writer.write_from(waiting)
    assert told.stored == ["a", "c", "b"]
    assert node.connections == 2


def test_what_comes_back_is_written_again_and_what_is_optional_is_dropped(node, told, caplog):
    # Given two writes to a queue that is gone for a moment, of which the first is optional
    node.answer = lambda channel, tag, queue: channel.give_back(tag, queue)
    waiting = deque([told.write("gone", "optional", optional=True), told.write("gone", "needed")])
    writer = BatchWriter(node, told)
    # When they are written
    writer.write_from(waiting)
    # Then only what is needed waits, and the log says why
    assert [write.body for write in waiting] == [b"needed"]
    assert "the queue 'gone' is gone" in caplog.text
    # And it is stored when the queue is back
    node.answer = lambda channel, tag, queue: channel.ack(tag)
    writer.write_from(waiting)
    assert told.stored == ["gone"]


def test_what_the_broker_refuses_for_good_is_found_and_its_neighbours_are_stored(node, told):
    # Given a broker that closes the channel over one of three writes, whenever it comes
    def answer(channel: Channel, tag: int, queue: str) -> None:
        if queue == "b":
            raise PreconditionFailed("message size 20 is larger than configured max size 10")
        channel.ack(tag)

    node.answer = answer
    waiting = deque(told.write(queue) for queue in "abc")
    writer = BatchWriter(node, told)
    # When they are written until none waits
    while waiting:
        writer.write_from(waiting)
    # Then that one was told why, and the others are stored
    ((queue, refusal),) = told.refused
    assert queue == "b"
    assert "larger than configured" in refusal.why
    assert told.stored == ["a", "c"]


def test_headers_that_fit_no_frame_are_refused_before_they_are_sent(node, told):
    # Given a write whose headers are too large
    headers = {"application_headers": {"error": "x" * 140_000}}
    large = Write("dead", b"", headers, None, lambda refusal: told.refused.append(("dead", refusal)))
    # When it is written beside another
    BatchWriter(node, told).write_from(deque([large, told.write("a")]))
    # Then it is told how much room there is, and the other is stored
    ((_, refusal),) = told.refused
    assert refusal.headers_bytes_max == Channel.frame_max - 64
    assert node.received == [("a", "")]
    assert told.stored == ["a"]


def test_what_was_not_answered_for_is_written_again_after_a_loss(node, told):
    # Given a connection that is lost after the first of three answers
    def lose(channel: Channel, tag: int) -> None:
        raise ConnectionResetError

    once(node, "b", lose)
    waiting = deque(told.write(queue) for queue in "abc")
    writer = BatchWriter(node, told)
    # When they are written until none waits
    while waiting:
        writer.write_from(waiting)
    # Then the first was written once, and the others again, in their order
    assert [queue for queue, _ in node.received] == ["a", "b", "c", "b", "c"]
    assert told.stored == ["a", "b", "c"]
