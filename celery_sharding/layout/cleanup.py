"""Removing queues that the group has left behind, and a whole group.

    drained ──a minute later, nobody consumes it──▶ its ring is deleted: nothing can be routed to it any more
            ──▶ what came too late is moved ──▶ its queues are deleted ──▶ "removed" is written

A message is late if the broker took longer than the grace of the switch to put it into its queue, behind the end
marker. It was confirmed, so it is not lost: it is published to the group again, under its key, and a warning says so.
It may come behind messages of its key that were published after it.

Each step may be done again, so a removal that was cut short is done from its beginning by the next worker that looks;
only a message that was moved and not yet acknowledged comes twice then. Everything is done under the group's lock. The
broker refuses to delete a quorum queue only if it is empty or unused, so that is looked at before.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import amqp

from celery_sharding.errors import LockHeld, TopologyError
from celery_sharding.keys import key_of_message
from celery_sharding.layout.contents import BEYOND, waiting_tasks
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load, load_to_write, write
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.rabbitmq.queues import count_consumers, queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.rabbitmq.streams import publish_confirmed
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)

KEEP_SECONDS = 60.0
_STEP_SECONDS = 30.0


def removable(layout: Layout, *, now: float, keep_seconds: float = KEEP_SECONDS) -> list[Segment]:
    """Return the segments that may be removed: drained for a while, and nothing before them is still consumed."""
    found = []
    for segment in layout.segments[:-1]:
        if not segment.is_drained or now - segment.drained_at < keep_seconds:
            break
        found.append(segment)
    return found


def remove_drained(
    connect: Connect, group: str, *, owner: str, known: Layout, keep_seconds: float = KEEP_SECONDS
) -> None:
    """Remove what `removable` says; quick, and without the broker, if that is nothing.

    What another process has locked, or a worker still consumes, is left to a later call.

    Args:
        known: The layout as the caller tails it.

    Raises:
        LogError: The manifest could not be read or written, or a late message not moved.
        BrokerUnavailable, LockLost: The broker was lost; the next call goes on.
    """
    if not removable(known, now=time.time(), keep_seconds=keep_seconds):
        return
    names = Names(group)
    with (
        contextlib.suppress(LockHeld),
        GroupLock(connect, names, owner=owner, timeout_seconds=0) as lock,
        lock.operation() as connection,
    ):
        layout = load_to_write(connection, names)
        for segment in removable(layout, now=time.time(), keep_seconds=keep_seconds):
            if layout.switch is not None or is_consumed(connection, names, segment):
                return
            moved = remove_segment(connection, names, segment)
            layout = write(connection, names, layout, {"event": "removed", "segment": segment.name}, by=owner)
            logger.info("group %s: %s was drained and is removed", group, segment.name)
            if moved:
                logger.warning(
                    "group %s: messages came to %s behind its end: %d; they run now, maybe behind later ones of their "
                    "keys",
                    group,
                    segment.name,
                    moved,
                )


def delete_group(connection: Opener, name: str) -> None:
    """Delete everything of the group, messages included; what is not there is passed over."""
    names = Names(name)
    try:
        layout = load(connection, names)
    except TopologyError as exc:
        logger.debug("group %s: deleted without its manifest (%s)", name, exc)
        layout = Layout()
    shards = max([layout.shards, *(segment.shards for segment in layout.segments)])
    with brief_channel(connection) as channel:
        for exchange in (names.publish, names.next, names.unrouted):
            channel.exchange_delete(exchange)
        for number in range(1, layout.limbo + BEYOND + 1):
            channel.queue_delete(names.limbo(number))
        for generation in range(1, layout.generation + BEYOND + 1):
            channel.exchange_delete(names.ring(generation))
            index = 0
            while index < shards or queue_exists(connection, names.shard(generation, index)):
                channel.queue_delete(names.shard(generation, index))
                index += 1
        for queue in (names.manifest, names.journal, names.attempts, names.dead):
            channel.queue_delete(queue)


def is_consumed(connection: Opener, names: Names, segment: Segment) -> bool:
    return any(count_consumers(connection, queue) for queue in segment.queues(names))


def remove_segment(connection: Any, names: Names, segment: Segment) -> int:
    """Delete the ring and queues of a drained segment; return how many late messages were moved. Under the lock."""
    if segment.kind == "ring":
        with brief_channel(connection) as channel:
            channel.exchange_delete(names.ring(segment.number))
    return sum(
        remove_queue(connection, names, queue) for queue in segment.queues(names) if queue_exists(connection, queue)
    )


def remove_queue(connection: Any, names: Names, queue: str) -> int:
    """Publish to the group what is left in a queue that nobody consumes or fills, and delete it; return how much."""
    moved = 0
    with brief_channel(connection) as target:
        for source, message in waiting_tasks(connection, queue):
            key, problem = key_of_message(message, exchange=names.publish)
            if problem is not None:
                key = message.delivery_info["routing_key"]
            again = amqp.Message(message.body, **message.properties)
            publish_confirmed(target, again, key, exchange=names.publish, timeout_seconds=_STEP_SECONDS)
            source.basic_ack(message.delivery_tag)
            moved += 1
    with brief_channel(connection) as channel, explained(names.group, queue):
        channel.queue_delete(queue)
    return moved
