"""What a caller is told about a sharded publish, and what is stored then: a real broker behind a broken network."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from amqp import Message
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import BrokerUnavailable, Nacked, OutcomeUnknown, PublishError, Unroutable
from celery_sharding.publish.connection import Link
from celery_sharding.testing import Direction, FaultProxy
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names

pytestmark = pytest.mark.timeout(90)

TO_CLIENT, TO_SERVER = Direction.TO_CLIENT, Direction.TO_SERVER


class Publisher:
    """An app with one group and one task, and a look at what its first limbo holds."""

    def __init__(self, group: str, url: str, *, direct_url: str | None = None, **conf: object) -> None:
        self.names = Names(group)
        self._direct_url = direct_url or url
        self.app = Celery(group, broker=url, set_as_current=False)
        self.app.conf.update({"sharding_publish_timeout_seconds": 1.5, "broker_connection_timeout": 1.0, **conf})
        Sharding(self.app, groups=[ShardGroup(group, shards=2)])

        def step(key: str, number: int, text: str = "") -> None:
            pass

        self.step = self.app.task(shared=False, shard_group=group, shard_key="key", name="step")(step)

    def stored(self) -> list[tuple[str, int]]:
        """Take what is stored, in order. A marker put behind it tells its end."""
        found: list[Message] = []
        with Connection(self._direct_url) as connection:
            channel = connection.channel()
            channel.basic_publish(Message("end", type="end"), routing_key=self.names.limbo(1))
            channel.basic_consume(self.names.limbo(1), callback=found.append, no_ack=True)
            while not found or found[-1].properties.get("type") != "end":
                connection.drain_events(timeout=20)
        return [(message.headers["shard_key"], self._number(channel, message)) for message in found[:-1]]

    def _number(self, channel, message) -> int:
        args, kwargs, _ = channel.message_to_python(message).decode()
        return kwargs["number"] if "number" in kwargs else args[1]

    def change(self, method: str, *args: object, **kwargs: object) -> None:
        """Do something to the group's queues and exchanges, past the library."""
        with Connection(self._direct_url) as connection:
            getattr(connection.channel(), method)(*args, **kwargs)


@pytest.fixture
def publisher(group_name: str, broker_url: str) -> Publisher:
    return Publisher(group_name, broker_url)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def far(group_name: str, broker_url: str, proxy: FaultProxy) -> Publisher:
    """A publisher behind the proxy, connected, with one message stored."""
    far = Publisher(group_name, proxy.url, direct_url=broker_url)
    far.step.delay("a", 0)
    return far


def test_what_is_published_before_any_worker_ran_is_kept_in_order(publisher: Publisher) -> None:
    for number in range(20):
        publisher.step.delay(f"k{number % 3}", number)

    assert publisher.stored() == [(f"k{number % 3}", number) for number in range(20)]


def test_the_message_is_persistent_and_carries_its_key_and_nothing_that_breaks_the_order(publisher: Publisher) -> None:
    # Given defaults and options that the broker would act on
    publisher.app.conf.task_default_priority = 7
    publisher.step.apply_async(("a", 1), expires=600, delivery_mode=1, compression="gzip", app_id="shop")
    # When it lies in the queue
    found: list[Message] = []
    with Connection(publisher._direct_url) as connection:
        connection.channel().basic_consume(publisher.names.limbo(1), callback=found.append, no_ack=True)
        connection.drain_events(timeout=20)
    (message,) = found
    # Then it outlives a restart, does not expire in the queue, does not overtake, and says what it is
    assert message.properties["delivery_mode"] == 2
    assert not {"expiration", "priority"} & set(message.properties)
    assert message.properties["app_id"] == "shop"
    assert message.headers["expires"]
    assert message.headers["shard_key"] == message.delivery_info["routing_key"] == "a"
    assert message.headers["shard_sent_at"] == pytest.approx(time.time(), abs=60)
    assert len(message.headers["shard_message_id"]) == 32


def test_a_message_that_no_queue_takes_is_an_error_and_the_next_publish_is_right(publisher: Publisher) -> None:
    # Given a group whose limbo is bound to nothing
    names = publisher.names
    publisher.step.delay("a", 1)
    publisher.change("queue_unbind", names.limbo(1), names.unrouted, "")
    # When messages are published, then each is an error
    for _ in range(3):
        with pytest.raises(Unroutable, match="celery shards declare") as caught:
            publisher.step.apply_async(("a", 2), task_id="lost")
        assert (caught.value.task_id, caught.value.group) == ("lost", names.group)
    # And when it is bound again, a success is one, and an error is one
    publisher.change("queue_bind", names.limbo(1), names.unrouted, "")
    publisher.step.delay("a", 3)
    publisher.change("queue_unbind", names.limbo(1), names.unrouted, "")
    with pytest.raises(Unroutable):
        publisher.step.delay("a", 4)
    assert publisher.stored() == [("a", 1), ("a", 3)]


def test_a_message_that_the_broker_refuses_is_tried_again_and_then_an_error(publisher: Publisher) -> None:
    # Given a limbo that takes one message and refuses more
    names = publisher.names
    fill_limbo(publisher)
    # When more is published, then the caller is told that it is not stored
    for _ in range(2):
        with pytest.raises(Nacked, match="not stored"):
            publisher.step.apply_async(("a", 2), confirm_timeout=10.0)
    assert count(publisher, names.limbo(1)) == 1
    # And when there is room, the next is taken
    publisher.change("queue_purge", names.limbo(1))
    publisher.step.delay("a", 3)
    assert count(publisher, names.limbo(1)) == 1


def test_a_refusal_that_passes_costs_the_caller_nothing(publisher: Publisher) -> None:
    # Given a limbo that is full, and a publish that it refuses
    names = publisher.names
    fill_limbo(publisher)
    (first,) = links_of(publisher)
    done = threading.Event()
    thread = threading.Thread(
        target=lambda: (publisher.step.apply_async(("a", 2), confirm_timeout=20), done.set()), daemon=True
    )
    thread.start()
    assert wait_until(lambda: first not in links_of(publisher), timeout_seconds=20)
    # When it gets room
    publisher.change("queue_purge", names.limbo(1))
    # Then the publish succeeds, once, on another connection
    assert done.wait(20)
    assert count(publisher, names.limbo(1)) == 1


def test_without_an_answer_the_outcome_is_unknown_and_nothing_is_sent_again(far: Publisher, proxy: FaultProxy) -> None:
    # Given a network that loses what the broker answers
    proxy.blackhole(TO_CLIENT)
    # When a task is published, then the caller is told, in time
    started = time.monotonic()
    with pytest.raises(OutcomeUnknown, match="may have arrived") as caught:
        far.step.apply_async(("a", 1), task_id="t1")
    assert time.monotonic() - started < 10
    assert (caught.value.task_id, caught.value.group) == ("t1", far.names.group)
    # And when the network is whole again, the next publish is right, and the first is stored once
    proxy.heal()
    far.step.delay("a", 2)
    assert far.stored() == [("a", 0), ("a", 1), ("a", 2)]


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_cut_while_the_confirm_is_awaited_is_an_unknown_outcome(
    far: Publisher, proxy: FaultProxy, reset: bool
) -> None:
    # Given a message that has gone out, and no answer
    proxy.blackhole(TO_CLIENT)
    before = proxy.passed(TO_SERVER)
    errors: list[Exception] = []

    def publish() -> None:
        try:
            far.step.apply_async(("a", 1), confirm_timeout=60)
        except PublishError as exc:
            errors.append(exc)

    thread = threading.Thread(target=publish)
    thread.start()
    assert proxy.wait_for(TO_SERVER, passed=before + 400)
    # When the connection is cut
    proxy.cut(reset=reset)
    thread.join(20)
    # Then the caller is told at once, and the next publish is right
    assert [type(error) for error in errors] == [OutcomeUnknown]
    proxy.heal()
    far.step.delay("a", 2)
    assert far.stored() in ([("a", 0), ("a", 1), ("a", 2)], [("a", 0), ("a", 2)])


def test_a_connection_that_died_while_idle_costs_the_caller_nothing(far: Publisher, proxy: FaultProxy) -> None:
    for number, reset in enumerate([False, True], 1):
        proxy.cut(reset=reset)
        far.step.delay("a", number)

    assert far.stored() == [("a", 0), ("a", 1), ("a", 2)]


def test_a_broker_that_is_down_is_an_error_in_bounded_time_and_the_next_publish_is_right(
    far: Publisher, proxy: FaultProxy
) -> None:
    # Given a broker that is gone
    proxy.refuse()
    # When tasks are published, then each is an error soon
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(BrokerUnavailable, match="not sent") as caught:
            far.step.apply_async(("a", 1), task_id="t1")
        assert caught.value.task_id == "t1"
    assert time.monotonic() - started < 20
    # And when it is back, nothing of them comes
    proxy.heal()
    far.step.delay("a", 2)
    assert far.stored() == [("a", 0), ("a", 2)]


def test_a_broker_that_takes_connections_and_says_nothing_is_an_error_in_bounded_time(
    group_name: str, proxy: FaultProxy, broker_url: str
) -> None:
    # Given a network that swallows everything, and retries without end
    publisher = Publisher(group_name, proxy.url, direct_url=broker_url)
    publisher.app.conf.task_publish_retry_policy = {"max_retries": None, "interval_start": 0, "interval_max": 0.1}
    proxy.blackhole()
    # When a task is published, then the caller does not wait for ever
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        publisher.step.delay("a", 1)
    assert time.monotonic() - started < 15


def test_a_connection_that_goes_silent_before_the_message_left_is_an_error_in_bounded_time(
    far: Publisher, proxy: FaultProxy
) -> None:
    # Given a connection that a second group is looked up on, and that goes silent
    (link,) = links_of(far)
    link.groups.clear()
    proxy.blackhole(TO_CLIENT)
    # When its group is published to, then the caller hears that nothing was sent
    with pytest.raises(BrokerUnavailable, match="not sent"):
        far.step.delay("a", 1)
    proxy.heal()
    far.step.delay("a", 2)
    assert far.stored() == [("a", 0), ("a", 2)]


def test_a_message_that_could_not_leave_as_a_whole_is_never_stored(far: Publisher, proxy: FaultProxy) -> None:
    # Given a network that takes nothing more, and a message larger than all its buffers
    proxy.stall(TO_SERVER)
    with pytest.raises(BrokerUnavailable, match="not sent"):
        far.step.delay("a", 1, text="x" * 14_000_000)
    # When what was under way arrives
    proxy.heal()
    far.step.delay("a", 2)
    # Then the broker made nothing of it
    assert far.stored() == [("a", 0), ("a", 2)]


def test_large_messages_pass(publisher: Publisher) -> None:
    publisher.step.delay("a", 1, text="x" * 5_000_000)
    publisher.step.delay("a", 2)

    assert publisher.stored() == [("a", 1), ("a", 2)]


def test_a_header_that_does_not_fit_is_an_error_and_the_next_publish_is_right(publisher: Publisher) -> None:
    with pytest.raises(PublishError, match="not stored"):
        publisher.step.apply_async(("a", 1), headers={"odd": object()})
    publisher.step.delay("a", 2)

    assert publisher.stored() == [("a", 2)]


def test_an_exchange_that_is_gone_is_declared_anew_and_the_message_stored_once(publisher: Publisher) -> None:
    # Given several idle connections that know the group
    threads = [threading.Thread(target=publisher.step.delay, args=("a", 0)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # When someone deletes its exchange
    publisher.change("exchange_delete", publisher.names.publish)
    publisher.step.apply_async(("a", 1), confirm_timeout=20)
    publisher.step.apply_async(("a", 2), confirm_timeout=20)
    # Then nothing is lost or doubled
    assert publisher.stored() == [("a", 0)] * 8 + [("a", 1), ("a", 2)]


def test_threads_publish_at_once_and_each_key_keeps_its_order(publisher: Publisher) -> None:
    # Given 16 threads with a key and 50 messages each
    failed: list[Exception] = []

    def publish(key: str) -> None:
        try:
            for number in range(50):
                publisher.step.apply_async((key, number), confirm_timeout=30)
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=publish, args=(f"k{index}",)) for index in range(16)]
    # When all publish
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Then all of it is there, each key in order
    by_key = defaultdict(list)
    for key, number in publisher.stored():
        by_key[key].append(number)
    assert failed == []
    assert by_key == {f"k{index}": list(range(50)) for index in range(16)}


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded, KeyboardInterrupt])
def test_an_interrupt_in_the_middle_of_a_publish_leaves_nothing_behind(
    far: Publisher, proxy: FaultProxy, error: type[BaseException]
) -> None:
    # Given a publish that waits for its confirm
    proxy.blackhole(TO_CLIENT)

    def interrupt(number: int, frame: object) -> None:
        raise error

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    # When the task that publishes is interrupted
    try:
        with pytest.raises(error):
            far.step.apply_async(("a", 1), confirm_timeout=60)
    finally:
        signal.signal(signal.SIGALRM, previous)
    # Then its connection is gone, and the next publish gets its own answer
    assert not links_of(far)
    proxy.heal()
    far.step.delay("a", 2)
    assert far.stored() == [("a", 0), ("a", 1), ("a", 2)]


def test_connections_are_kept_and_not_leaked(far: Publisher, proxy: FaultProxy) -> None:
    # Given many publishes, some of which fail
    far.step.delay("a", 1)
    for number in range(5):
        proxy.blackhole(TO_CLIENT)
        with pytest.raises(OutcomeUnknown):
            far.step.apply_async(("a", number), confirm_timeout=0.2)
        proxy.heal()
        far.step.delay("a", number)
    # Then one connection is left, and it is reused
    assert len(links_of(far)) == 1
    assert open_sockets_to(proxy) == 1


def test_a_producer_and_a_connection_of_the_caller_may_be_named(publisher: Publisher, broker_url: str) -> None:
    with Connection(broker_url) as connection:
        publisher.step.apply_async(("a", 1), connection=connection)
        publisher.step.apply_async(("a", 2), producer=publisher.app.amqp.Producer(connection, auto_declare=False))

    assert publisher.stored() == [("a", 1), ("a", 2)]


def test_an_app_that_confirms_its_own_publishes_is_told_the_same(
    group_name: str, broker_url: str, proxy: FaultProxy
) -> None:
    # Given an app with confirms of its own
    options = {"confirm_publish": True}
    publisher = Publisher(group_name, proxy.url, direct_url=broker_url, broker_transport_options=options)
    publisher.step.delay("a", 1)
    # When an answer is lost, then it is unknown, once
    proxy.blackhole(TO_CLIENT)
    with pytest.raises(OutcomeUnknown):
        publisher.step.delay("a", 2)
    proxy.heal()
    publisher.step.delay("a", 3)
    assert publisher.stored() == [("a", 1), ("a", 2), ("a", 3)]


def test_a_confirmed_task_is_confirmed_though_its_event_could_not_be_sent(publisher: Publisher, caplog) -> None:
    # Given events that cannot be sent, since their connection leads nowhere
    publisher.app.conf.task_send_sent_event = True
    publisher.app.conf.task_publish_retry = False
    nowhere = Connection(publisher._direct_url, connect_timeout=1)
    nowhere.connect()
    nowhere.connection.sock.shutdown(socket.SHUT_RDWR)
    # When a task is published, then it is stored, and the caller not told otherwise
    publisher.step.apply_async(("a", 1), producer=publisher.app.amqp.Producer(nowhere, auto_declare=False))
    assert publisher.stored() == [("a", 1)]
    assert "task-sent event" in caplog.text
    nowhere.release()


def fill_limbo(publisher: Publisher) -> None:
    """Make the group's limbo one that takes one message and refuses more, and give it that one."""
    names = publisher.names
    publisher.step.delay("a", 0)
    publisher.change("queue_delete", names.limbo(1))
    publisher.change(
        "queue_declare", names.limbo(1), durable=True, auto_delete=False,
        arguments={"x-max-length": 1, "x-overflow": "reject-publish"},
    )  # fmt: skip
    publisher.change("queue_bind", names.limbo(1), names.unrouted, "")
    publisher.step.delay("a", 1)


def links_of(publisher: Publisher) -> set[Link]:
    """Return the connections that the publisher has open."""
    return set(publisher.app.sharding.backing()._publisher._links)


def count(publisher: Publisher, queue: str) -> int:
    with Connection(publisher._direct_url) as connection:
        return connection.channel().queue_declare(queue, passive=True).message_count


def open_sockets_to(proxy: FaultProxy) -> int:
    """Count this process's sockets to the proxy, as the system sees them."""
    port = int(proxy.url.rpartition(":")[2].strip("/"))
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            with socket.fromfd(int(entry.name), socket.AF_INET, socket.SOCK_STREAM) as sock:
                found += sock.getpeername()[1] == port
        except OSError:
            continue
    return found
