"""Pausing and resuming a group, or one shard of it: two events of its manifest, which every worker obeys.

    consumed ──pause──▶ paused ──resume──▶ consumed

A pause lasts until it is resumed, whatever restarts meanwhile. Workers (`worker.consume.group`) start no further task
of what is paused, let running ones end, and then stop consuming; messages wait in their queues, in order.

A shard and the whole group are paused separately. Pausing the group also pauses its limbo. Resuming the group resumes
all of its shards.

Only a consumer can see the end of a queue. So while a shard is paused that a switch has left (a reshard, or a recovery
after the broker lost its ring), the chain waits for it, and with it all shards of the next generation. A reshard is
refused while single shards are paused.
"""

from __future__ import annotations

from celery_sharding.config import ShardGroup
from celery_sharding.errors import TopologyError
from celery_sharding.layout.events import Paused, Resumed
from celery_sharding.layout.lock import locked_layout, not_declared
from celery_sharding.layout.manifest import write
from celery_sharding.layout.model import Layout
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.shard_names import check_shard

_LOCK_SECONDS = 15.0


def pause(connect: Connect, group: ShardGroup, index: int | None, *, by: str) -> bool:
    """Pause one shard of a group, or all of it (None); return False if it was paused already.

    Workers know within milliseconds. Running tasks go on to their end.

    Raises:
        UnknownShard: The group has no such shard.
        TopologyError: The group is not declared.
        BrokerUnavailable: The broker could not be reached.
        LockHeld: Another process held the group's lock all the time.
        LogError, LockLost: The broker failed on the way; it may be paused or not. Try again.
    """
    return _change(connect, group, index, by=by, verb="pause")


def resume(connect: Connect, group: ShardGroup, index: int | None, *, by: str) -> bool:
    """Resume one shard of a group, or all of it (None); return False if nothing of it was paused.

    Arguments and errors as for `pause`.

    Raises:
        TopologyError: One shard is to be resumed of a group that is paused as a whole.
    """
    return _change(connect, group, index, by=by, verb="resume")


def _change(connect: Connect, group: ShardGroup, index: int | None, *, by: str, verb: str) -> bool:
    with locked_layout(connect, group.name, timeout_seconds=_LOCK_SECONDS, allow_switch=True) as locked:
        layout = locked.layout
        if index is not None:
            if not layout.shards:
                raise not_declared(group.name)
            check_shard(group.name, index, layout.shards)
        if not (_needs_pause(layout, index) if verb == "pause" else _needs_resume(layout, group.name, index)):
            return False
        write(locked.connection, locked.names, layout, Paused(index) if verb == "pause" else Resumed(index), by=by)
        return True


def _needs_pause(layout: Layout, index: int | None) -> bool:
    return None not in layout.paused and index not in layout.paused


def _needs_resume(layout: Layout, group: str, index: int | None) -> bool:
    if index is None:
        return bool(layout.paused)
    if None in layout.paused:
        raise TopologyError(
            f"group {group!r} is paused as a whole; run `celery shards resume {group}`, which resumes all its shards",
            group=group,
        )
    return index in layout.paused
