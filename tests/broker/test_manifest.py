"""The logs and the lock of a group, on a real broker."""

from __future__ import annotations

import datetime
import logging
import threading

import amqp
import pytest
from kombu import Connection

from celery_sharding import topology
from celery_sharding.config import ShardGroup
from celery_sharding.errors import (
    BrokerUnavailable,
    LockHeld,
    LogError,
    ManifestConflict,
    PluginMissing,
    TopologyError,
    TopologyMismatch,
)
from celery_sharding.layout.cleanup import delete_group
from celery_sharding.layout.events import Drained, Paused, Resumed
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load, write
from celery_sharding.layout.model import Layout
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.queues import count_ready, queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.rabbitmq.streams import append, read_to_end
from celery_sharding.topology import Names

PAUSE, RESUME = Paused(None), Resumed(None)


@pytest.fixture
def names(connection, group_name) -> Names:
    """A group of which the logs exist, and nothing else."""
    with brief_channel(connection) as channel:
        topology.declare_logs(channel, group_name)
    return Names(group_name)


def put(connection, stream, *bodies):
    with brief_channel(connection) as channel:
        for body in bodies:
            channel.basic_publish_confirm(amqp.Message(body), exchange="", routing_key=stream)


def test_an_empty_stream_is_read_to_its_end(connection, names):
    assert read_to_end(connection, names.journal) == []
    assert read_to_end(connection, names.journal) == []


def test_events_come_back_in_order_with_their_offsets_and_version(connection, names):
    with brief_channel(connection) as channel:
        for number in range(700):
            append(channel, names.journal, {"event": "vitals", "n": number})

    events = read_to_end(connection, names.journal)

    assert [event["n"] for _, event in events] == list(range(700))
    assert [offset for offset, _ in events] == sorted({offset for offset, _ in events})
    assert {event["v"] for _, event in events} == {1}


def test_a_read_from_an_offset_returns_that_event_and_what_follows(connection, names):
    with brief_channel(connection) as channel:
        for number in range(10):
            append(channel, names.journal, {"event": "vitals", "n": number})
    offset = read_to_end(connection, names.journal)[6][0]

    assert [event["n"] for _, event in read_to_end(connection, names.journal, offset=offset)] == [6, 7, 8, 9]


def test_a_read_from_one_past_the_last_event_returns_nothing(connection, names):
    with brief_channel(connection) as channel:
        append(channel, names.journal, {"event": "vitals"})
    last = read_to_end(connection, names.journal)[-1][0]

    assert read_to_end(connection, names.journal, offset=last + 1) == []


def test_a_read_from_a_moment_misses_nothing_since(connection, names):
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
    with brief_channel(connection) as channel:
        append(channel, names.journal, {"event": "vitals", "n": 1})

    assert [event["n"] for _, event in read_to_end(connection, names.journal, offset=moment)] == [1]


def test_a_foreign_message_in_a_stream_is_reported_and_passed_over(connection, names, caplog):
    put(connection, names.journal, b"\xff\xfe", b"[1]", b'{"no": "name"}', b'{"event": "of tomorrow", "x": 1}')

    with caplog.at_level(logging.WARNING):
        events = read_to_end(connection, names.journal)

    assert events == [(3, {"event": "of tomorrow", "x": 1})]
    assert len([record for record in caplog.records if "no event of this library" in record.message]) == 3


def test_many_readers_at_once_each_reach_the_end(broker_url, connection, names):
    # Given a stream and eight readers, whose nonces stand in each other's way
    put(connection, names.journal, *(b'{"event": "x", "n": %d}' % number for number in range(50)))
    found: list[int] = []

    def read() -> None:
        with Connection(broker_url) as mine:
            found.append(len(read_to_end(mine, names.journal)))

    # When all read at once
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # Then each finds all events
    assert found == [50] * 8


def test_a_stream_that_does_not_exist_is_an_error_and_the_channel_stays_right(connection, names):
    with brief_channel(connection) as channel:
        with pytest.raises(LogError, match="no queue") as caught:
            append(channel, f"{names.publish}.nowhere", {"event": "vitals"})
        assert caught.value.missing
        append(channel, names.journal, {"event": "vitals"})

    assert len(read_to_end(connection, names.journal)) == 1


def test_without_a_manifest_the_layout_is_empty(connection, group_name):
    assert load(connection, Names(group_name)) == Layout()


def test_what_one_process_writes_another_reads(connection, names):
    layout = write(connection, names, Layout(), PAUSE, by="a")

    assert layout.is_paused(0)
    assert load(connection, names) == layout
    assert load(connection, names, since=layout) == layout


def test_a_writer_on_an_old_layout_changes_nothing_and_is_told(connection, names):
    # Given two holders that read the same layout
    layout = write(connection, names, Layout(), PAUSE, by="a")
    resumed = write(connection, names, layout, RESUME, by="a")
    # When the second, which lost the lock, writes on it
    with pytest.raises(ManifestConflict):
        write(connection, names, layout, Paused(3), by="b")
    # Then its event is void for every reader, and the next writer goes on
    assert load(connection, names) == resumed
    assert write(connection, names, resumed, PAUSE, by="a").is_paused(3)


def test_facts_between_two_layout_events_are_no_conflict(connection, names):
    layout = write(connection, names, Layout(), PAUSE, by="a")
    with brief_channel(connection) as channel:
        append(channel, names.manifest, Drained("limbo001", names.limbo(1), by="w").as_dict())

    assert not write(connection, names, layout, RESUME, by="a").paused


def test_only_one_process_holds_the_lock_and_the_next_gets_it(connect, group_name):
    names = Names(group_name)
    first = GroupLock(connect, names, timeout_seconds=5)
    second = GroupLock(connect, names, timeout_seconds=0.2)

    with first, pytest.raises(LockHeld, match=group_name), second:
        pass
    with GroupLock(connect, names, timeout_seconds=5) as lock, lock.channel() as channel:
        assert channel.is_open


def test_one_who_waits_gets_the_lock_when_it_is_given_up(connect, group_name):
    names, held, got = Names(group_name), threading.Event(), threading.Event()

    def wait_for_it() -> None:
        held.wait(10)
        with GroupLock(connect, names, timeout_seconds=20):
            got.set()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    with GroupLock(connect, names, timeout_seconds=5):
        held.set()
        assert not got.wait(0.3)
    assert got.wait(20)
    thread.join(10)


def test_a_holder_whose_connection_died_can_do_nothing_more(connect, group_name):
    # Given a holder
    names = Names(group_name)
    with GroupLock(connect, names, timeout_seconds=5) as lock:
        # When its connection is cut
        with lock.operation() as mine:
            mine.transport.sock.close()
        # Then each of its operations fails, the connection is not opened again, and another takes the lock
        for _ in range(2):
            with pytest.raises(TopologyError, match="lost"), lock.channel():
                pass
        other = GroupLock(connect, names, timeout_seconds=20)
        with other, pytest.raises(TopologyError, match="lost"), lock.channel():
            pass


def test_a_broker_that_is_not_there_is_named_as_such(group_name):
    def connect() -> Connection:
        return Connection("amqp://127.0.0.1:1//")

    lock = GroupLock(connect, Names(group_name), timeout_seconds=1)

    with pytest.raises(BrokerUnavailable, match=group_name), lock:
        pass


def test_an_exchange_type_that_the_broker_does_not_know_names_the_plugin(broker_url, group_name):
    # The refusal closes the connection on 3.x, the channel on 4.x
    ring = Names(group_name).ring(1)
    with (
        Connection(broker_url) as connection,
        brief_channel(connection) as channel,
        pytest.raises(PluginMissing) as caught,
        explained(group_name, ring),
    ):
        channel.exchange_declare(ring, "x-no-such-type", durable=False, auto_delete=False)

    assert "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange" in str(caught.value)


def test_missing_shards_are_named_one_by_one(connection, group_name):
    group, names = ShardGroup(group_name, 6), Names(group_name)
    with brief_channel(connection) as channel:
        topology.declare_limbo(channel, group, 1)
        topology.declare_ring(channel, group, 1, 6)
        channel.queue_delete(names.shard(1, 0))
        channel.queue_delete(names.shard(1, 4))

    assert topology.missing_shards(connection, names, 1, 6) == [0, 4]
    assert topology.ring_exists(connection, names, 1)
    assert not topology.ring_exists(connection, names, 2)
    assert count_ready(connection, names.shard(1, 1)) == 0
    assert count_ready(connection, names.shard(1, 4)) is None


def test_a_queue_with_other_arguments_is_a_mismatch(connection, group_name):
    group, names = ShardGroup(group_name, 2), Names(group_name)
    with brief_channel(connection) as channel:
        channel.queue_declare(names.shard(1, 1), durable=True, auto_delete=False)

    with brief_channel(connection) as channel, pytest.raises(TopologyMismatch, match=r"g001\.001"):
        topology.declare_ring(channel, group, 1, 2)


def test_a_deleted_group_leaves_nothing(connection, group_name):
    group, names = ShardGroup(group_name, 3), Names(group_name)
    with brief_channel(connection) as channel:
        topology.declare_fixed(channel, group, limbo=1)
        topology.declare_ring(channel, group, 2, 3)

    delete_group(connection, group_name)

    assert not topology.fixed_exists(connection, names)
    assert topology.missing_shards(connection, names, 2, 3) == [0, 1, 2]
    for queue in (names.manifest, names.journal, names.attempts, names.dead, names.limbo(1)):
        assert not queue_exists(connection, queue)
