"""Old records of a group's streams go, and its layout does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import amqp
import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.errors import LogError
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.manifest import load
from celery_sharding.layout.retention import EVERY_MAX, Reading
from celery_sharding.monitoring.history import read_history
from celery_sharding.operations.pause import pause
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.queues import queue_exists
from celery_sharding.rabbitmq.streams import decode, encode, read_records
from celery_sharding.rabbitmq.tail import Tail
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names

pytestmark = pytest.mark.timeout(180)

# What the manifest keeps at most: 32 MB, and the segments of 1 MB that are begun and not filled.
KEPT_BYTES = 34_000_000
NONCE = encode({"event": "nonce", "nonce": "0" * 32})
LARGE = encode({"event": "nonce", "nonce": "0" * 1_000_000})


@pytest.fixture
def group(connect, group_name) -> ShardGroup:
    made = ShardGroup(group_name, 2)
    ensure_group(connect, made, owner="test")
    return made


def append_all(connection: Connection, stream: str, body: bytes, count: int) -> None:
    with brief_channel(connection) as channel:
        for _ in range(count):
            message = amqp.Message(body, delivery_mode=2)
            channel.basic_publish_confirm(message, exchange="", routing_key=stream)


def make_snapshot(connection: Connection, names: Names) -> None:
    """Look as often as somebody must to write a snapshot."""
    append_all(connection, names.manifest, NONCE, EVERY_MAX)
    load(connection, names)


def push_out(connection: Connection, names: Names) -> None:
    """Write so much to a manifest that what it held before is gone, and look at it now and then."""
    for _ in range(2):
        append_all(connection, names.manifest, LARGE, KEPT_BYTES // len(LARGE) // 2 + 2)
        make_snapshot(connection, names)


def test_old_records_of_the_manifest_go_and_its_layout_stays(connect, connection, group, names) -> None:
    # Given a group of which a shard is paused
    pause(connect, group, 1, by="test")
    before = load(connection, names)
    # When much was written to its manifest
    push_out(connection, names)
    # Then what is kept begins late, and no more is kept than should be
    records = read_records(connection, names.manifest, offset="first")
    assert records[0][0] > 0
    assert sum(event is not None and len(event.get("nonce", "")) for _, event in records) < KEPT_BYTES
    # and it says the same
    assert load(connection, names) == before
    assert ensure_group(connect, group, owner="test") == before
    # and the group goes on from there, its history, too
    pause(connect, group, 0, by="later")
    assert load(connection, names).paused == {0, 1}
    assert [(entry.by, entry.result) for entry in read_history(connection, group.name)] == [("later", "done")]


def test_looks_alone_never_lose_the_layout(connection, group, names) -> None:
    # Given a group that nobody works on
    before = load(connection, names)
    for _ in range(2):
        # When it is looked at for very long
        push_out(connection, names)
        # Then each look knows the layout, and hands it on to the next
        assert load(connection, names) == before


def test_a_manifest_that_lost_its_layout_is_an_error_and_the_group_is_not_made_anew(
    connect, connection, group, names
) -> None:
    # Given a manifest whose first records are gone without a snapshot
    append_all(connection, names.manifest, LARGE, KEPT_BYTES // len(LARGE) + 2)
    # When somebody looks, or wants to put the group right
    acts: list[Callable[[], object]] = [
        lambda: load(connection, names),
        lambda: ensure_group(connect, group, owner="test", wait_seconds=1),
        lambda: pause(connect, group, None, by="test"),
    ]
    for act in acts:
        with pytest.raises(LogError, match="the layout is unknown"):
            act()
    # Then nothing was made
    assert not queue_exists(connection, names.shard(2, 0))
    assert not queue_exists(connection, names.limbo(3))


def test_who_tails_from_a_record_that_is_gone_goes_on_from_a_snapshot(connect, connection, group, names) -> None:
    # Given a layout that was read long ago
    layout = load(connection, names)
    pause(connect, group, 1, by="test")
    push_out(connection, names)
    # When the manifest is tailed from there
    reading, missed = Reading(layout), []

    def note(body: bytes, offset: int) -> None:
        reading.note(offset, decode(body, stream=names.manifest, offset=offset))
        missed.append(reading.misses)

    Tail(connection, names.manifest, layout.through + 1, note)
    wanted = load(connection, names)
    assert wait_until(lambda: drain(connection) or reading.layout.through >= wanted.through, timeout_seconds=60)
    # Then it knows that it missed something, until it does not any more
    assert missed[0] is not None
    assert reading.misses is None
    assert reading.layout == wanted
    assert reading.layout.paused == {1}


def drain(connection: Connection) -> None:
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=1)


@pytest.mark.parametrize("segment_bytes", [1_000_000, 8_000_000], ids=["attempts", "journal"])
def test_old_records_of_the_other_streams_go_by_their_age(connection, group_name, segment_bytes: int) -> None:
    # Given a stream that is declared as the group's is, but for a shorter age
    arguments: dict[str, Any] = {"x-queue-type": "stream", "x-max-age": "1s"}
    arguments["x-stream-max-segment-size-bytes"] = segment_bytes
    queue = f"{Names(group_name).publish}.aged"
    with brief_channel(connection) as channel:
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
    try:
        append_all(connection, queue, LARGE, 20)

        def are_gone() -> bool:
            append_all(connection, queue, LARGE, 10)
            return read_records(connection, queue, offset="first")[0][0] >= 10

        # Then, when some time has passed, the first that are written make the old ones go
        assert wait_until(are_gone, timeout_seconds=40)
    finally:
        with brief_channel(connection) as channel:
            channel.queue_delete(queue)
