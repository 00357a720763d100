"""Publishing while the broker blocks publishers, stops, or restarts: on a node that no other test uses."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from amqp import Message
from celery import Celery
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import BrokerBlocked, BrokerUnavailable, OutcomeUnknown, ShardingError
from celery_sharding.testing import RabbitNode
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names

# They share a node, so they run in one process.
pytestmark = pytest.mark.xdist_group("publishing_alarms")


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitNode]:
    with RabbitNode() as started:
        yield started


@pytest.fixture
def publisher(node: RabbitNode) -> Iterator[Publisher]:
    publisher = Publisher(node)
    yield publisher
    publisher.clear_alarm()


class Publisher:
    """An app with a group on the node, and the switch of the node's memory alarm."""

    def __init__(self, node: RabbitNode) -> None:
        self.node = node
        self.group = f"t{uuid.uuid4().hex[:12]}"
        self.app = Celery(self.group, broker=node.url, set_as_current=False)
        self.app.conf.sharding_publish_timeout_seconds = 2.0
        Sharding(self.app, groups=[ShardGroup(self.group, shards=2)])

        def step(key: str, number: int) -> None:
            pass

        self.step = self.app.task(shared=False, shard_group=self.group, shard_key="key", name="step")(step)

    def raise_alarm(self) -> None:
        self.node.ctl("set_vm_memory_high_watermark", "0.00001")
        assert wait_until(lambda: "memory" in self.node.ctl("eval", "rabbit_alarm:get_alarms()."), timeout_seconds=30)

    def clear_alarm(self) -> None:
        self.node.ctl("set_vm_memory_high_watermark", "0.6")
        assert wait_until(
            lambda: "memory" not in self.node.ctl("eval", "rabbit_alarm:get_alarms()."), timeout_seconds=30
        )

    def outcome(self, number: int) -> str:
        """Publish, and return the name of the error, "" if there is none."""
        try:
            self.step.delay("a", number)
        except ShardingError as exc:
            return type(exc).__name__
        return ""

    def stored(self) -> list[int]:
        """Take what is stored, in order, up to a marker behind it."""
        found: list[Message] = []
        limbo = Names(self.group).limbo(1)
        with Connection(self.node.url) as connection:
            channel = connection.channel()
            channel.basic_publish(Message("end", type="end"), routing_key=limbo)
            channel.basic_consume(limbo, callback=found.append, no_ack=True)
            while not found or found[-1].properties.get("type") != "end":
                connection.drain_events(timeout=20)
        return [channel.message_to_python(message).decode()[0][1] for message in found[:-1]]


def test_while_the_broker_blocks_only_the_first_publish_is_sent(publisher: Publisher) -> None:
    # Given idle connections of several threads, and a memory alarm
    at_once = threading.Barrier(4)
    run_threads(lambda index: (at_once.wait(10), publisher.outcome(0)), 4)
    publisher.raise_alarm()
    # When the first task is published, then it may be stored or not
    assert publisher.outcome(1) in (OutcomeUnknown.__name__, BrokerBlocked.__name__)
    # And what follows is not sent, from one thread and from many
    started = time.monotonic()
    assert publisher.outcome(2) == BrokerBlocked.__name__
    assert run_threads(publisher.outcome, 4) == [BrokerBlocked.__name__] * 4
    assert time.monotonic() - started < 20
    # And when the alarm is over, publishing works, and nothing comes back from the dead
    publisher.clear_alarm()
    assert publisher.outcome(3) == ""
    assert publisher.stored() in ([0, 0, 0, 0, 1, 3], [0, 0, 0, 0, 3])


def test_a_publish_that_waits_for_the_end_of_an_alarm_goes_through(publisher: Publisher) -> None:
    # Given a publisher that knows that the broker blocks
    publisher.outcome(0)
    publisher.raise_alarm()
    publisher.outcome(1)
    # When more is published with time to wait, by several threads, and the alarm ends
    waiting: list[Exception] = []

    def publish(index: int) -> None:
        try:
            publisher.step.apply_async((f"k{index}", index), confirm_timeout=60)
        except ShardingError as exc:
            waiting.append(exc)

    threads = [threading.Thread(target=publish, args=(number,)) for number in (2, 3, 4)]
    for thread in threads:
        thread.start()
    publisher.clear_alarm()
    for thread in threads:
        thread.join(60)
    # Then all of it is stored, once
    assert waiting == []
    found = publisher.stored()
    assert found[:2] == [0, 1]
    assert sorted(found[2:]) == [2, 3, 4]


def test_a_message_of_unknown_outcome_that_is_sent_again_stays_in_front_of_its_successors(publisher: Publisher) -> None:
    # Given a message whose outcome is unknown, because of an alarm
    publisher.outcome(0)
    publisher.raise_alarm()
    with pytest.raises(OutcomeUnknown):
        publisher.step.apply_async(("a", 1), task_id="again")
    # When the alarm is over, and it is sent again, and another after it
    publisher.clear_alarm()
    publisher.step.apply_async(("a", 1), task_id="again")
    publisher.outcome(2)
    # Then the ghost came first, not last
    assert publisher.stored() == [0, 1, 1, 2]


def test_the_first_publish_of_all_under_an_alarm_is_an_error_in_bounded_time(publisher: Publisher) -> None:
    publisher.raise_alarm()
    started = time.monotonic()
    assert publisher.outcome(1) != ""
    assert time.monotonic() - started < 40
    publisher.clear_alarm()
    assert publisher.outcome(2) == ""
    assert publisher.stored()[-1] == 2


def test_a_restart_of_the_broker_costs_an_idle_publisher_nothing(publisher: Publisher) -> None:
    publisher.outcome(0)
    publisher.node.restart()

    assert publisher.outcome(1) == ""
    assert publisher.stored() == [0, 1]


def test_a_broker_that_is_down_is_an_error_and_its_return_needs_nothing(publisher: Publisher) -> None:
    publisher.outcome(0)
    publisher.node.stop()
    assert [publisher.outcome(1), publisher.outcome(2)] == [BrokerUnavailable.__name__] * 2
    publisher.node.start()

    assert publisher.outcome(3) == ""
    assert publisher.stored() == [0, 3]


def run_threads(call, count: int) -> list[object]:
    """Call with 0, 1, … in threads of their own, and return the answers."""
    answers: list[object] = []
    threads = [threading.Thread(target=lambda index=index: answers.append(call(index))) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers
