"""Throwing away what waits in the shards of a group.

What a worker holds stays and runs. Markers and seals, which say where a segment ends, stay: they are only in earlier
segments, which are emptied by consuming them, and only if no worker does. The live segment holds none as long as no
switch is under way, and none begins, since the group's lock is held; so its queues are purged by the broker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery_sharding.errors import TopologyError
from celery_sharding.layout.contents import waiting_tasks
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load_to_write
from celery_sharding.layout.model import Layout
from celery_sharding.layout.notes import noted
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.rabbitmq.queues import count_consumers, count_ready, queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.shard_names import check_shard
from celery_sharding.topology import Names

_LOCK_SECONDS = 10.0


def count_purgeable(connect: Connect, group: str, index: int | None) -> dict[str, int]:
    """Return by queue how much `purge` would throw away; a hint. Errors as for `purge`."""
    with _locked(connect, group, index, by="shards purge") as (connection, _, queues):
        return {queue: count_ready(connection, queue) or 0 for queue in queues}


def purge(connect: Connect, group: str, index: int | None, *, by: str) -> dict[str, int]:
    """Throw away what waits in a shard of a group, or in all of it; return how much by queue, workers' probes included.

    Args:
        index: Of the shard, in the live generation; None for all shards, what waits in earlier segments included.
        by: Who does it, for the history.

    Raises:
        UnknownShard: There is no such shard.
        TopologyError: The group is not declared, or a switch is under way, or an earlier segment is being consumed.
            Nothing was thrown away.
        LockHeld, LockLost, BrokerUnavailable: As for the lock.
    """
    done: dict[str, int] = {}
    with _locked(connect, group, index, by=by) as (connection, names, queues):
        facts = {} if index is None else {"shard": index}
        with noted(
            connection,
            names,
            "purge",
            by=by,
            result=lambda: f"{sum(done.values())} messages thrown away",
            counts=done,
            **facts,
        ):
            for queue, has_markers in queues.items():
                done[queue] = _empty(connection, queue) if has_markers else _purge(connection, group, queue)
    return done


@contextmanager
def _locked(
    connect: Connect, group: str, index: int | None, *, by: str
) -> Iterator[tuple[Any, Names, dict[str, bool]]]:
    """Yield, under the lock, the connection, and by queue whether it may hold markers."""
    names = Names(group)
    with (
        GroupLock(connect, names, owner=by, timeout_seconds=_LOCK_SECONDS) as lock,
        lock.operation() as connection,
    ):
        layout = load_to_write(connection, names)
        yield connection, names, _find_queues(connection, names, layout, index)


def _find_queues(connection: Any, names: Names, layout: Layout, index: int | None) -> dict[str, bool]:
    group = names.group
    if not layout.limbo:
        raise TopologyError(f"group {group!r} was never declared; there is nothing to purge", group=group)
    if layout.switch is not None:
        raise TopologyError(
            f"group {group!r} is in the middle of a switch; run `celery shards declare`, then try again", group=group
        )
    if index is not None:
        if not layout.generation:
            raise TopologyError(
                f"group {group!r} has no shards yet; what waits is in its limbo, and goes without a number", group=group
            )
        check_shard(group, index, layout.shards)
        return {names.shard(layout.generation, index): False}
    queues: dict[str, bool] = {}
    for segment in layout.segments[:-1]:
        queues |= {queue: True for queue in segment.queues(names) if queue not in segment.drained}
    consumed = [queue for queue in queues if count_consumers(connection, queue)]
    if consumed:
        raise TopologyError(
            f"group {group!r}: workers are about to finish {', '.join(consumed)}, of an earlier segment; wait until "
            "they have, or stop them, or purge one shard of the live generation",
            group=group,
        )
    queues |= dict.fromkeys((q for segment in layout.segments[-1:] for q in segment.queues(names)), False)
    queues[names.limbo(layout.limbo)] = False
    return {queue: markers for queue, markers in queues.items() if queue_exists(connection, queue)}


def _purge(connection: Any, group: str, queue: str) -> int:
    with brief_channel(connection) as channel, explained(group, queue):
        return int(channel.queue_purge(queue))


def _empty(connection: Any, queue: str) -> int:
    count = 0
    for channel, message in waiting_tasks(connection, queue):
        channel.basic_ack(message.delivery_tag)
        count += 1
    return count
