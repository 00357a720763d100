"""Batches of a worker's writes: who is told what, and what is written again."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import amqp
import pytest
from amqp.exceptions import NotFound, PreconditionFailed

from celery_sharding.worker.log import Refusal, Write
from celery_sharding.worker.log_batches import BatchWriter


class Node:
    """A broker behind kombu's and py-amqp's objects: `answer` says what becomes of each message, by its queue."""

    def __init__(self) -> None:
        self.answer: Callable[[Channel, int, str], None] = lambda channel, tag, queue: channel.ack(tag)
        self.connections = 0
        self.received: list[tuple[str, str]] = []

    def connect(self) -> Connection:
        self.connections += 1
        return Connection(self)


class Connection:
    alt: tuple[str, ...] = ()
    connect_timeout = None
    _connection_factory = None

    def __init__(self, node: Node) -> None:
        self._node = node
        self.connected = True

    @property
    def connection(self) -> Connection:
        return self

    def ensure_connection(self, *_: Any, **__: Any) -> None: ...

    def channel(self) -> Channel:
        return Channel(self._node)

    def collect(self, **_: Any) -> None:
        self.connected = False


class Channel:
    frame_max = 131_072

    def __init__(self, node: Node) -> None:
        self.node = node
        self.events: dict[str, set[Callable[..., None]]] = defaultdict(set)
        self._confirm_selected = False
        self._answers: deque[tuple[int, str, amqp.Message]] = deque()
        self._tag = 0

    @property
    def connection(self) -> Channel:
        return self

    def confirm_select(self, *, nowait: bool) -> None: ...

    def _basic_publish(self, message: amqp.Message, *, routing_key: str, **_: Any) -> None:
        self._tag += 1
        self.node.received.append((routing_key, message.body.decode()))
        self._answers.append((self._tag, routing_key, message))

    def drain_events(self, timeout: float) -> None:
        if not self._answers:
            raise TimeoutError
        tag, queue, self.message = self._answers.popleft()
        self.node.answer(self, tag, queue)

    def ack(self, tag: int) -> None:
        self._tell("basic_ack", tag, False)

    def nack(self, tag: int) -> None:
        self._tell("basic_nack", tag, False)

    def give_back(self, tag: int, queue: str) -> None:
        self._tell("basic_return", NotFound("NO_ROUTE"), "", queue, self.message)
        self.ack(tag)

    def _tell(self, event: str, *facts: Any) -> None:
        for handler in self.events[event]:
            handler(*facts)


class Told:
    """Makes calls at once, and keeps what they said."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.refused: list[tuple[str, Refusal]] = []

    def post(self, call: Callable[[], None]) -> None:
        call()

    def write(self, queue: str, body: str = "", **options: Any) -> Write:
        return Write(
            queue,
            body.encode(),
            {},
            lambda: self.stored.append(queue),
            lambda refusal: self.refused.append((queue, refusal)),
            **options,
        )


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
