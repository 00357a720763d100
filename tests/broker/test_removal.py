"""Queues that a group has left behind are removed, what came to them too late runs, and nobody notices."""

from __future__ import annotations

import json
import logging
import threading
import time

import amqp
import pytest
from kombu import Connection

from celery_sharding import topology
from celery_sharding.config import ShardGroup
from celery_sharding.layout.cleanup import Removal, remove_drained
from celery_sharding.layout.ensure import ensure_group, find_fault
from celery_sharding.layout.events import Drained
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load
from celery_sharding.layout.model import Layout
from celery_sharding.operations.gc import remove_left_behind
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.queues import count_ready, queue_exists
from celery_sharding.rabbitmq.streams import append, publish_confirmed, read_to_end
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.shops import Shop

LONG_AGO = time.time() - 3_600


@pytest.fixture
def group(connect, connection, group_name, names) -> ShardGroup:
    """A group whose ring was lost once: limbo001, g001 and limbo002 are drained, g002 is live."""
    made = ShardGroup(group_name, 4)
    ensure_group(connect, made, owner="w")
    with brief_channel(connection) as channel:
        channel.exchange_delete(names.ring(1))
    layout = ensure_group(connect, made, owner="w")
    for segment in layout.segments[:-1]:
        drain(connection, names, segment.queues(names), segment.name)
    return made


def drain(connection: Connection, names: Names, queues: tuple[str, ...], segment: str, *, at: float = LONG_AGO) -> None:
    """Take everything out of `queues`, and say so as their owners would have, a while ago."""
    with brief_channel(connection) as channel:
        for queue in queues:
            channel.queue_purge(queue)
            append(channel, names.manifest, Drained(segment, queue, by="w").as_dict() | {"at": at})


def left_behind(connection: Connection, names: Names) -> list[str]:
    queues = [names.limbo(1), *(names.shard(1, index) for index in range(4)), names.limbo(2)]
    return [queue for queue in queues if queue_exists(connection, queue)]


def put_late(connection: Connection, queue: str, key: str) -> None:
    message = amqp.Message(b"late", delivery_mode=2, application_headers={"shard_key": key, "mark": 7})
    with brief_channel(connection) as channel:
        publish_confirmed(channel, message, queue, timeout_seconds=10)


def read_live(connection: Connection, names: Names, count: int) -> list[amqp.Message]:
    found: list[amqp.Message] = []
    with brief_channel(connection) as channel:
        for index in range(4):
            channel.basic_consume(names.shard(2, index), callback=found.append, no_ack=True)
        while len(found) < count:
            connection.drain_events(timeout=20)
    return found


def test_what_was_drained_a_while_ago_is_removed_and_the_rest_goes_on(connect, connection, group, names):
    # Given a group that has left three segments behind
    before = load(connection, names)
    # When a worker looks
    remove_drained(connect, group.name, owner="w", known=before)
    # Then their queues are gone, the live ones are there, and all is well
    assert left_behind(connection, names) == []
    layout = load(connection, names)
    assert [segment.name for segment in layout.segments] == ["g002"]
    assert find_fault(connection, names, layout) is None
    # and the next look finds nothing to do
    remove_drained(connect, group.name, owner="w", known=layout)
    assert load(connection, names) == layout
    # and so does the next loss of the ring
    with brief_channel(connection) as channel:
        channel.exchange_delete(names.ring(2))
    layout = ensure_group(connect, group, owner="w")
    assert [segment.name for segment in layout.segments] == ["g002", "limbo003", "g003"]


def test_what_was_drained_just_now_stays(connect, connection, group, names):
    drain(connection, names, (names.shard(1, 3),), "g001", at=LONG_AGO)
    layout = load(connection, names)
    keep_seconds = time.time() - LONG_AGO + 60

    remove_drained(connect, group.name, owner="w", known=layout, keep_seconds=keep_seconds)

    assert load(connection, names) == layout
    assert len(left_behind(connection, names)) == 6


def test_a_message_that_came_too_late_goes_to_the_live_shards_under_its_key(connect, connection, group, names, caplog):
    # Given messages that came to old queues when they had been drained
    for number in range(3):
        put_late(connection, names.shard(1, 2), f"key{number}")
    put_late(connection, names.limbo(2), "other")
    # When the queues are removed
    with caplog.at_level(logging.WARNING):
        remove_drained(connect, group.name, owner="w", known=load(connection, names))
    # Then the messages are in the live shards, complete, under their keys, and somebody is told
    found = read_live(connection, names, 4)
    assert sorted(message.delivery_info["routing_key"] for message in found) == ["key0", "key1", "key2", "other"]
    assert {(bytes(message.body), message.headers["mark"]) for message in found} == {(b"late", 7)}
    assert left_behind(connection, names) == []
    assert "3 messages reached g001 after its end" in caplog.text
    assert "1 messages reached limbo002 after its end" in caplog.text


def test_a_segment_that_a_worker_still_consumes_is_left_alone(connect, connection, group, names):
    # Given a worker that has not yet seen that the first generation is drained
    with brief_channel(connection) as channel:
        channel.basic_consume(names.shard(1, 1), callback=lambda message: None)
        # When another looks, then it removes what is before, and nothing of that generation
        remove_drained(connect, group.name, owner="w", known=load(connection, names))
        assert len(left_behind(connection, names)) == 5
    # When the worker has followed, then the rest goes, too
    remove_drained(connect, group.name, owner="w", known=load(connection, names))
    assert left_behind(connection, names) == []


@pytest.mark.parametrize("done", range(1, 6))
def test_a_removal_that_was_killed_is_done_by_the_next(connect, connection, group, names, done):
    # Given a removal of the first generation that died after some of its steps, its fact not written
    layout = load(connection, names)
    with brief_channel(connection) as channel:
        channel.exchange_delete(names.ring(1))
        for index in range(done - 1):
            channel.queue_delete(names.shard(1, index))
    put_late(connection, names.limbo(2), "k")
    # When another worker looks
    remove_drained(connect, group.name, owner="w2", known=layout)
    # Then all of it is done
    assert left_behind(connection, names) == []
    assert [segment.name for segment in load(connection, names).segments] == ["g002"]
    assert len(read_live(connection, names, 1)) == 1


def test_two_workers_that_look_at_once_remove_it_once(connect, connection, group, names):
    layout: Layout = load(connection, names)
    put_late(connection, names.limbo(2), "k")
    errors: list[Exception] = []

    def look() -> None:
        try:
            remove_drained(connect, group.name, owner="w", known=layout)
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert left_behind(connection, names) == []
    assert sum(count_ready(connection, names.shard(2, index)) or 0 for index in range(4)) <= 1
    assert len(read_live(connection, names, 1)) == 1


def test_a_lock_that_is_held_leaves_it_to_a_later_look(connect, connection, group, names):
    with GroupLock(connect, names, timeout_seconds=5):
        remove_drained(connect, group.name, owner="w", known=load(connection, names))
    assert len(left_behind(connection, names)) == 6


def test_gc_removes_what_is_drained_and_says_why_the_rest_stays(connect, connection, group, names):
    # Given three segments that are drained, a worker that has not left the second, and a message that came too late
    put_late(connection, names.limbo(1), "k")
    with brief_channel(connection) as channel:
        channel.basic_consume(names.shard(1, 1), callback=lambda message: None)
        kept = [
            Removal("g001", "a worker still consumes it"),
            Removal("limbo002", "g001 comes before it"),
        ]
        # When gc is tried, then nothing changes; when it is done, then the first is removed, and its message runs
        assert remove_left_behind(connect, group.name, by="op", dry_run=True) == [Removal("limbo001"), *kept]
        assert len(left_behind(connection, names)) == 6
        assert remove_left_behind(connect, group.name, by="op", dry_run=False) == [Removal("limbo001", moved=1), *kept]
        assert len(left_behind(connection, names)) == 5
    assert len(read_live(connection, names, 1)) == 1
    # and when the worker has left, the rest is removed, though it was drained less than a minute ago
    drain(connection, names, (names.limbo(2),), "limbo002", at=time.time() - 10)
    assert remove_left_behind(connect, group.name, by="op", dry_run=False) == [Removal("g001"), Removal("limbo002")]
    assert left_behind(connection, names) == []
    assert find_fault(connection, names, load(connection, names)) is None
    assert remove_left_behind(connect, group.name, by="op", dry_run=False) == []


def test_gc_leaves_what_is_not_drained_or_was_just_now(connect, connection, group_name, names):
    ensure_group(connect, ShardGroup(group_name, 2), owner="w")
    assert remove_left_behind(connect, group_name, by="op", dry_run=False) == [
        Removal("limbo001", "not drained: 0 of 1 queues are done")
    ]
    drain(connection, names, (names.limbo(1),), "limbo001", at=time.time() + 60)
    (found,) = remove_left_behind(connect, group_name, by="op", dry_run=False)
    assert "drained just now" in str(found.kept_because)
    assert queue_exists(connection, names.limbo(1))


def test_gc_removes_what_came_back_after_its_removal(connect, connection, group, names):
    # Given a queue of a generation that was removed, brought back with a message in it by something that was slow
    remove_drained(connect, group.name, owner="w", known=load(connection, names))
    with brief_channel(connection) as channel:
        topology.declare_ring(channel, group, 1, 1)
    put_late(connection, names.shard(1, 0), "k")
    # When gc is done, then it is removed, the message runs, and the history says so
    found = remove_left_behind(connect, group.name, by="op", dry_run=False)
    assert found == [Removal(names.ring(1)), Removal(names.shard(1, 0), moved=1)]
    assert not topology.ring_exists(connection, names, 1)
    assert left_behind(connection, names) == []
    assert len(read_live(connection, names, 1)) == 1
    _, note = [event for _, event in read_to_end(connection, names.manifest) if event["event"] == "operated"]
    assert (note["verb"], note["by"], note["queue"]) == ("gc", "op", names.shard(1, 0))


def test_workers_remove_what_was_left_behind_while_they_run(connect, connection, group, names, shop: Shop):
    # Given a group that has left three segments behind, and a message that came too late to one of them
    call = shop.app.amqp.create_task_message("late-1", "shop.step", (), {"key": "k", "number": 0})
    late = amqp.Message(
        json.dumps(call.body),
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
        application_headers=call.headers | {"shard_group": group.name, "shard_key": "k"},
        **call.properties,
    )
    with brief_channel(connection) as channel:
        publish_confirmed(channel, late, names.shard(1, 0), timeout_seconds=10)
    shop.published.append(("k", 0))
    # When a worker runs
    shop.worker()
    # Then the old queues go, and the message runs
    assert wait_until(lambda: left_behind(connection, names) == [], timeout_seconds=60)
    assert wait_until(lambda: shop.trace.count("end") == 1, timeout_seconds=30)
    shop.send("step", "k", 1)
    assert wait_until(lambda: shop.trace.count("end") == 2, timeout_seconds=30)
    assert shop.verdict().is_clean
