"""Publisher confirms, whatever the order and the form of the broker's answers."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import amqp
import pytest
from amqp.exceptions import NotFound

from celery_sharding.errors import TopologyError
from celery_sharding.rabbitmq.confirms import Confirms, Outcome, publish_batch

CONFIRMED, RETURNED, NACKED = Outcome.CONFIRMED, Outcome.RETURNED, Outcome.NACKED


class Channel:
    """py-amqp's, of a broker that answers what a test says."""

    def __init__(self) -> None:
        self.events: dict[str, set[Callable[..., None]]] = defaultdict(set)
        self._confirm_selected = False
        self.selected = 0
        self.published: list[tuple[str, str, amqp.Message]] = []
        self.answers: deque[Callable[[], None]] = deque()

    @property
    def connection(self) -> Channel:
        return self

    def confirm_select(self, *, nowait: bool) -> None:
        self.selected += 1

    def _basic_publish(self, message: amqp.Message, *, exchange: str, routing_key: str, **options: Any) -> None:
        assert options["mandatory"]
        self.published.append((exchange, routing_key, message))

    def drain_events(self, timeout: float) -> None:
        assert timeout > 0
        if not self.answers:
            raise TimeoutError
        self.answers.popleft()()

    def tell(self, event: str, *facts: Any) -> None:
        for handler in self.events[event]:
            handler(*facts)

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        self.tell("basic_ack", tag, multiple)

    def nack(self, tag: int, *, multiple: bool = False) -> None:
        self.tell("basic_nack", tag, multiple)

    def give_back(self, number: int) -> None:
        """Return what was published as number `number`, as it comes from the wire: another message that is equal."""
        exchange, key, message = self.published[number - 1]
        self.tell("basic_return", NotFound("NO_ROUTE"), exchange, key, amqp.Message(message.body, **message.properties))


@pytest.fixture
def channel() -> Channel:
    return Channel()


def publish(channel: Channel, count: int, **options: Any) -> Confirms[int]:
    confirms: Confirms[int] = Confirms(channel, **options)
    for number in range(1, count + 1):
        confirms.publish(number, amqp.Message(b"", message_id=str(number)), "", "queue")
    return confirms


def test_one_answer_may_be_for_all_up_to_a_number(channel):
    # Given five messages, of which the third was nacked
    confirms = publish(channel, 5)
    channel.nack(3)
    # When the broker acknowledges all up to the fourth
    channel.ack(4, multiple=True)
    # Then the last one waits on, and each other is answered for once
    assert confirms.take_settled() == [(3, NACKED), (1, CONFIRMED), (2, CONFIRMED), (4, CONFIRMED)]
    assert confirms.take_settled() == []
    assert confirms.pending == [5]


def test_a_nack_may_be_for_all_up_to_a_number(channel):
    # Given three messages
    confirms = publish(channel, 3)
    # When the broker refuses the first two
    channel.nack(2, multiple=True)
    # Then the third is still pending
    assert confirms.take_settled() == [(1, NACKED), (2, NACKED)]
    assert confirms.pending == [3]


def test_answers_may_come_in_any_order(channel):
    # Given three messages
    confirms = publish(channel, 3)
    # When they are answered for from the last to the first, one of them twice
    for tag in (3, 1, 3, 2):
        channel.ack(tag)
    # Then each is confirmed once
    assert confirms.take_settled() == [(3, CONFIRMED), (1, CONFIRMED), (2, CONFIRMED)]
    assert confirms.pending == []


def test_a_returned_message_is_told_from_its_neighbours_before_its_ack(channel):
    # Given three messages, of which the second comes back
    confirms = publish(channel, 3)
    channel.give_back(2)
    assert confirms.pending == [1, 2, 3]
    # When all are acknowledged at once
    channel.ack(3, multiple=True)
    # Then only that one is returned
    assert confirms.take_settled() == [(1, CONFIRMED), (2, RETURNED), (3, CONFIRMED)]


def test_equal_messages_are_returned_one_each(channel):
    # Given three messages that nothing tells from each other
    confirms: Confirms[int] = Confirms(channel)
    for number in (1, 2, 3):
        confirms.publish(number, amqp.Message(b""), "exchange", "key")
    # When two come back
    channel.give_back(1)
    channel.give_back(2)
    channel.ack(3, multiple=True)
    # Then two are returned
    assert [outcome for _, outcome in confirms.take_settled()] == [RETURNED, RETURNED, CONFIRMED]


def test_a_header_tells_messages_of_one_id_from_each_other(channel):
    # Given two copies of a task, each with a mark of its own
    confirms: Confirms[str] = Confirms(channel, mark="mark")
    for mark in ("first", "second"):
        message = amqp.Message(b"", correlation_id="task", application_headers={"mark": mark})
        confirms.publish(mark, message, "exchange", "key")
    # When the second comes back
    channel.give_back(2)
    channel.ack(2, multiple=True)
    # Then it is the one that is returned
    assert confirms.take_settled() == [("first", CONFIRMED), ("second", RETURNED)]


def test_answers_for_what_was_forgotten_change_nothing(channel):
    # Given a message whose answer nobody waited for, and another after it
    confirms = publish(channel, 1)
    confirms.forget()
    confirms.publish(2, amqp.Message(b"", message_id="2"), "", "queue")
    # When the first comes back late, and is acknowledged
    channel.give_back(1)
    channel.ack(1)
    # Then the second is pending still, and its own answer counts
    assert confirms.take_settled() == []
    channel.nack(2)
    assert confirms.take_settled() == [(2, NACKED)]


def test_tags_begin_anew_on_a_channel_that_was_opened_again(channel):
    # Given a channel that the broker has closed, which py-amqp opens again, out of confirm mode
    confirms = publish(channel, 2)
    channel._confirm_selected = False
    # When it is published on, and the first message is acknowledged
    confirms.publish(3, amqp.Message(b"", message_id="3"), "", "queue")
    channel.ack(1)
    # Then that is the new one, and the channel is in confirm mode again
    assert confirms.take_settled() == [(3, CONFIRMED)]
    assert confirms.pending == []
    assert channel.selected == 2


def test_waiting_ends_with_the_last_answer_or_in_time(channel):
    # Given two messages, and a broker that answers for one at a time
    confirms = publish(channel, 2)
    channel.answers += [lambda: channel.ack(2), lambda: channel.ack(1), lambda: pytest.fail("nothing is pending")]
    # When they are waited for, then it is until both are answered for
    confirms.wait(time.monotonic() + 30)
    assert confirms.pending == []
    # When there is no time left, then nothing is read
    confirms.publish(3, amqp.Message(b"", message_id="3"), "", "queue")
    with pytest.raises(TimeoutError):
        confirms.wait(time.monotonic() - 1)
    assert confirms.pending == [3]


def test_a_lost_channel_leaves_pending_what_was_not_answered_for(channel):
    # Given two messages, of which one is answered for before the broker closes the channel
    confirms = publish(channel, 2)

    def close() -> None:
        raise NotFound("NOT_FOUND - no exchange")

    channel.answers += [lambda: channel.ack(1), close]
    # When they are waited for
    with pytest.raises(NotFound):
        confirms.wait(time.monotonic() + 30)
    # Then it is known of which nothing is known
    assert confirms.take_settled() == [(1, CONFIRMED)]
    assert confirms.pending == [2]


def test_a_batch_tells_which_were_not_stored(channel):
    # Given a batch of which one comes back and one is refused
    batch = [(amqp.Message(b""), "exchange", key) for key in "abcd"]
    channel.answers += [lambda: channel.give_back(2), lambda: channel.nack(4), lambda: channel.ack(3, multiple=True)]
    # When it is published
    confirms: Confirms[int] = Confirms(channel)
    # Then these two are named
    assert publish_batch(confirms, batch) == {1, 3}
    # And a batch that is not answered for is an error
    with pytest.raises(TopologyError, match="did not confirm"):
        publish_batch(confirms, batch[:1])
