"""Removing at once what a group has left behind, and saying why what cannot be removed yet stays.

Workers remove drained segments by themselves, a minute later (`removal`). Here an operator asks for it, and is told.
Beside the chain there may be queues of segments that the manifest counts as removed: a process that was slow, or a
broker that lost power, may bring one back. Queues beyond the manifest are none of these: a worker takes them in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from celery_sharding import topology
from celery_sharding.errors import TopologyError
from celery_sharding.layout.cleanup import is_consumed, remove_queue, remove_segment
from celery_sharding.layout.contents import existing_queues
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load_to_write, write
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.layout.notes import noted
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.rabbitmq.queues import count_consumers
from celery_sharding.topology import Names

# Shorter than a worker waits, since somebody asks; longer than a message is on its way inside the broker.
KEEP_SECONDS = 5.0
_LOCK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a segment that was left behind, or of a queue without one.

    Attributes:
        kept_because: Why it stays; None: it is removed, or would be.
        moved: Messages that were in it, and run now.
    """

    name: str
    kept_because: str | None = None
    moved: int = 0


def collect(connect: Connect, group: str, *, by: str, dry_run: bool) -> list[Finding]:
    """Remove what the group has left behind and return what was found, the oldest first.

    Args:
        by: Who does it, for the history.
        dry_run: Only find.

    Raises:
        TopologyError: The group is not declared, or a queue could not be emptied.
        LockHeld, LockLost, BrokerUnavailable: As for the lock.
    """
    names = Names(group)
    with (
        GroupLock(connect, names, owner=by, timeout_seconds=_LOCK_SECONDS) as lock,
        lock.operation() as connection,
    ):
        layout = load_to_write(connection, names)
        if not layout.limbo:
            raise TopologyError(f"group {group!r} was never declared; there is nothing to remove", group=group)
        found = list(_collect_segments(connection, names, layout, by=by, dry_run=dry_run))
        return found + list(_collect_queues(connection, names, layout, by=by, dry_run=dry_run))


def _collect_segments(connection: Any, names: Names, layout: Layout, *, by: str, dry_run: bool) -> Iterator[Finding]:
    first_kept = ""
    for segment in layout.segments[:-1]:
        why = f"{first_kept} comes before it" if first_kept else _why_kept(connection, names, layout, segment)
        if why is not None:
            first_kept = first_kept or segment.name
            yield Finding(segment.name, why)
        elif dry_run:
            yield Finding(segment.name)
        else:
            moved = remove_segment(connection, names, segment)
            layout = write(connection, names, layout, {"event": "removed", "segment": segment.name}, by=by)
            yield Finding(segment.name, moved=moved)


def _why_kept(connection: Any, names: Names, layout: Layout, segment: Segment) -> str | None:
    if layout.switch is not None:
        return "a switch is under way; run `celery shards declare`, or wait"
    if not segment.is_drained:
        return f"not drained: {len(segment.drained)} of {segment.shards} queues are done"
    if time.time() - segment.drained_at < KEEP_SECONDS:
        return f"drained just now; try again in {KEEP_SECONDS:.0f} s"
    if is_consumed(connection, names, segment):
        return "a worker consumes it still"
    return None


def _collect_queues(connection: Any, names: Names, layout: Layout, *, by: str, dry_run: bool) -> Iterator[Finding]:
    """Find queues and rings with numbers that the manifest has used, outside the chain."""
    in_chain = {(segment.kind, segment.number) for segment in layout.segments}
    limbos = [Segment("limbo", number) for number in range(1, layout.limbo)]
    rings = [Segment("ring", number, shards=0) for number in range(1, layout.generation + 1)]
    lost = [segment for segment in (*limbos, *rings) if (segment.kind, segment.number) not in in_chain]
    prefixes = {f"{names.publish}.{segment.name}" for segment in lost}
    for segment in lost:
        if segment.kind == "ring" and topology.ring_exists(connection, names, segment.number):
            if not dry_run:
                with brief_channel(connection) as channel:
                    channel.exchange_delete(names.ring(segment.number))
            yield Finding(names.ring(segment.number))
    for queue in existing_queues(connection, names, layout):
        if queue not in prefixes and queue.rpartition(".")[0] not in prefixes:
            continue
        if count_consumers(connection, queue):
            yield Finding(queue, "not in the chain, but somebody consumes it")
        elif dry_run:
            yield Finding(queue)
        else:
            moved = 0
            with noted(connection, names, "gc", by=by, result=lambda: "removed", queue=queue):
                moved = remove_queue(connection, names, queue)
            yield Finding(queue, moved=moved)
