"""Throwing away what waits in the shards of a group.

What a worker holds stays and runs. The markers and seals that say where a segment ends stay, too. Only earlier segments
hold any: they are emptied by consuming them, if no worker does. The live segment holds none unless a switch is under
way, and none can begin under the group's lock; so the broker purges its queues.
"""

from __future__ import annotations

from typing import Any

from celery_sharding.errors import TopologyError
from celery_sharding.layout.contents import waiting_tasks
from celery_sharding.layout.lock import LockedLayout, locked_layout
from celery_sharding.operations.audit import recorded
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.rabbitmq.queues import count_consumers, count_ready, queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.shard_names import check_shard

_THROWN_AWAY = "{} messages thrown away"


def count_purgeable(connect: Connect, group: str, index: int | None) -> dict[str, int]:
    """Return by queue about how much `purge` would throw away. Errors as for `purge`."""
    with locked_layout(connect, group) as locked:
        return {queue: count_ready(locked.connection, queue) or 0 for queue in _find_queues(locked, index)}


def purge(connect: Connect, group: str, index: int | None, *, by: str) -> dict[str, int]:
    """Throw away what waits in a shard of a group, or in all of it; return how much by queue, workers' probes included.

    Args:
        index: Of the shard, in the live generation; None for all shards, what waits in earlier segments included.

    Raises:
        UnknownShard: There is no such shard.
        TopologyError: The group is not declared, or a switch is under way, or an earlier segment is being consumed.
            Nothing was thrown away.
        LockHeld, LockLost, BrokerUnavailable: As for the lock.
    """
    done: dict[str, int] = {}
    with locked_layout(connect, group) as locked:
        connection, queues = locked.connection, _find_queues(locked, index)
        facts = {"counts": done} | ({} if index is None else {"shard": index})
        with recorded(
            connection, locked.names, "purge", by=by, result=_THROWN_AWAY.format(0), facts=facts
        ) as operation:
            for queue, has_markers in queues.items():
                done[queue] = _empty(connection, queue) if has_markers else _purge(connection, group, queue)
                operation.result = _THROWN_AWAY.format(sum(done.values()))
    return done


def _find_queues(locked: LockedLayout, index: int | None) -> dict[str, bool]:
    """Return by queue whether it may hold markers."""
    connection, names, layout = locked.connection, locked.names, locked.layout
    group = names.group
    if index is not None:
        if not layout.generation:
            raise TopologyError(
                f"group {group!r} has no shards yet; its messages are in limbo; purge it without a number",
                group=group,
            )
        check_shard(group, index, layout.shards)
        return {names.shard(layout.generation, index): False}
    queues: dict[str, bool] = {}
    for segment in layout.segments[:-1]:
        queues |= {queue: True for queue in segment.queues(names) if queue not in segment.drained}
    consumed = [queue for queue in queues if count_consumers(connection, queue)]
    if consumed:
        raise TopologyError(
            f"group {group!r}: workers are about to finish {', '.join(consumed)}, of an earlier segment; wait for "
            "them, or stop them, or purge single shards of the live generation",
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
