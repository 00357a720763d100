"""Removing at once what a group has left behind, and saying why the rest stays.

Workers remove drained segments by themselves, a minute later (`layout.cleanup`). Here an operator asks for it.
There may also be queues of segments that the manifest counts as removed: a slow process, or a broker that lost power,
may bring one back. Queues that the manifest does not know yet are not among them: a worker adopts those.
"""

from __future__ import annotations

from collections.abc import Iterator

from celery_sharding import topology
from celery_sharding.layout.cleanup import Removal, delete_ring, remove_queue, remove_segments
from celery_sharding.layout.contents import existing_queues
from celery_sharding.layout.lock import LockedLayout, locked_layout
from celery_sharding.layout.model import Segment
from celery_sharding.operations.audit import recorded
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.rabbitmq.queues import count_consumers

# Shorter than a worker waits, since somebody asks; longer than a message is under way inside the broker.
KEEP_SECONDS = 5.0


def remove_left_behind(connect: Connect, group: str, *, by: str, dry_run: bool) -> list[Removal]:
    """Remove what the group has left behind, and return what was found, the oldest first.

    Args:
        dry_run: Only find.

    Raises:
        TopologyError: The group is not declared, or a queue could not be emptied.
        LockHeld, LockLost, BrokerUnavailable: As for the lock.
    """
    with locked_layout(connect, group, allow_switch=True) as locked:
        found = list(remove_segments(locked, by=by, keep_seconds=KEEP_SECONDS, dry_run=dry_run))
        return found + list(_remove_strays(locked, by=by, dry_run=dry_run))


def _remove_strays(locked: LockedLayout, *, by: str, dry_run: bool) -> Iterator[Removal]:
    """Remove queues and rings with numbers that the manifest has used, outside the chain."""
    connection, names, layout = locked.connection, locked.names, locked.layout
    in_chain = {(segment.kind, segment.number) for segment in layout.segments}
    limbos = [Segment("limbo", number) for number in range(1, layout.limbo)]
    rings = [Segment("ring", number, shards=0) for number in range(1, layout.generation + 1)]
    lost = [segment for segment in (*limbos, *rings) if (segment.kind, segment.number) not in in_chain]
    prefixes = {f"{names.publish}.{segment.name}" for segment in lost}
    for segment in lost:
        if segment.kind == "ring" and topology.ring_exists(connection, names, segment.number):
            if not dry_run:
                delete_ring(connection, names, segment.number)
            yield Removal(names.ring(segment.number))
    for queue in existing_queues(connection, names, layout):
        if queue not in prefixes and queue.rpartition(".")[0] not in prefixes:
            continue
        if count_consumers(connection, queue):
            yield Removal(queue, "not in the chain, but it has a consumer")
        elif dry_run:
            yield Removal(queue)
        else:
            moved = 0
            with recorded(connection, names, "gc", by=by, result="removed", facts={"queue": queue}):
                moved = remove_queue(connection, names, queue)
            yield Removal(queue, moved=moved)
