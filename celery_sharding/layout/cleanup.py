"""Removing what a group has left behind, and a whole group: the one place that deletes queues.

    drained ──a minute later, nobody consumes it──▶ its ring is deleted: nothing can be routed to it any more
            ──▶ late messages are moved ──▶ its queues are deleted ──▶ "removed" is written

A message is late if the broker took longer than the grace of the switch to put it into its queue, so it stands behind
the end marker. It was confirmed, so it must not be lost: it is published to the group again, under its key, and a
warning says so. It may come after messages of its key that were published later.

Each step may be repeated. If a removal is cut short, the next worker begins again; only a message that was moved and
not acknowledged is delivered twice then. Everything happens under the group's lock. A broker cannot be told to delete a
quorum queue only if it is empty or unused, so that is checked before.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import amqp

from celery_sharding.errors import LockHeld, TopologyError
from celery_sharding.keys import key_of_message
from celery_sharding.layout.contents import BEYOND, waiting_tasks
from celery_sharding.layout.events import SegmentRemoved
from celery_sharding.layout.lock import LockedLayout, locked_layout
from celery_sharding.layout.manifest import load, write
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


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of a segment that was left behind, or of a queue without one.

    Attributes:
        kept_because: Why it stays; None: it is removed, or would be.
        moved: Messages that were in it, and run now.
    """

    name: str
    kept_because: str | None = None
    moved: int = 0


def remove_drained(
    connect: Connect, group: str, *, owner: str, known: Layout, keep_seconds: float = KEEP_SECONDS
) -> None:
    """Remove the segments that are drained for `keep_seconds`; quick, and without the broker, if there is none.

    What another process has locked, or a worker still consumes, is left to a later call.

    Args:
        known: The layout as the caller tails it.

    Raises:
        LogError: The manifest could not be read or written, or a late message not moved.
        BrokerUnavailable, LockLost: The broker was lost; the next call goes on.
    """
    if not known.segments[:-1] or why_kept(known, known.segments[0], keep_seconds=keep_seconds):
        return
    with (
        contextlib.suppress(LockHeld),
        locked_layout(connect, group, timeout_seconds=0, allow_switch=True, allow_undeclared=True) as locked,
    ):
        for removal in remove_segments(locked, by=owner, keep_seconds=keep_seconds):
            if removal.kept_because is not None:
                return
            logger.info("group %s: %s was drained and is removed", group, removal.name)
            if removal.moved:
                logger.warning(
                    "group %s: %d messages reached %s after its end; they run now, maybe after later ones of their key",
                    group,
                    removal.moved,
                    removal.name,
                )


def remove_segments(
    locked: LockedLayout, *, by: str, keep_seconds: float = KEEP_SECONDS, dry_run: bool = False
) -> Iterator[Removal]:
    """Remove the drained segments of the chain, the oldest first, up to the first that must stay; say so of each.

    Args:
        keep_seconds: How long a drained segment stays.
        dry_run: Only say what would become of them.
    """
    connection, names, layout = locked.connection, locked.names, locked.layout
    first_kept = ""
    for segment in layout.segments[:-1]:
        if first_kept:
            yield Removal(segment.name, f"{first_kept} comes before it")
            continue
        why = why_kept(layout, segment, keep_seconds=keep_seconds)
        if why is None and any(count_consumers(connection, queue) for queue in segment.queues(names)):
            why = "a worker still consumes it"
        moved = 0
        if why is not None:
            first_kept = segment.name
        elif not dry_run:
            moved = _remove_segment(connection, names, segment)
            layout = write(connection, names, layout, SegmentRemoved(segment.name), by=by)
        yield Removal(segment.name, why, moved)


def why_kept(layout: Layout, segment: Segment, *, keep_seconds: float) -> str | None:
    """Return why `segment`, which is not the last, must stay for now, whoever consumes it; None if nothing is known."""
    if layout.switch is not None:
        return "a switch is under way; run `celery shards declare`, or wait"
    if not segment.is_drained:
        return f"not drained: {len(segment.drained)} of {segment.shards} queues are done"
    if time.time() - segment.drained_at < keep_seconds:
        return f"drained just now; try again in {keep_seconds:.0f} s"
    return None


def delete_group(connection: Opener, name: str) -> None:
    """Delete everything of the group, messages included."""
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
            # To delete what does not exist is quicker than to look, which costs a channel.
            while index < shards or queue_exists(connection, names.shard(generation, index)):
                channel.queue_delete(names.shard(generation, index))
                index += 1
        for queue in (names.manifest, names.journal, names.attempts, names.dead):
            channel.queue_delete(queue)


def _remove_segment(connection: Any, names: Names, segment: Segment) -> int:
    """Delete the ring and queues of a drained segment; return how many late messages were moved. Under the lock."""
    if segment.kind == "ring":
        delete_ring(connection, names, segment.number)
    return sum(
        remove_queue(connection, names, queue) for queue in segment.queues(names) if queue_exists(connection, queue)
    )


def delete_ring(connection: Opener, names: Names, generation: int) -> None:
    """Delete a ring, so that its queues get no more messages. Under the lock."""
    with brief_channel(connection) as channel:
        channel.exchange_delete(names.ring(generation))


def remove_queue(connection: Any, names: Names, queue: str) -> int:
    """Publish to the group what is left in a queue that nobody consumes or fills, delete it, and return how much."""
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
