"""Removing a whole group from the broker, unless anything of it waits or is consumed.

    whole ──nothing waits, no worker──▶ closed: `shards.<group>` is deleted, so every publish is an error
    closed ──what was under way has arrived, still nothing waits──▶ gone: queues and rings, the manifest last
    closed ──a message had arrived──▶ whole again: the exchange is declared and bound as it was

All of it under both locks of the group. A process that is killed in between leaves a group that a worker or `shards
declare` repairs, or the next removal removes. A publisher that finds no exchange may declare the group anew once the
lock is free; then its message waits in the new group, and is not lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from amqp.exceptions import AMQPError

from celery_sharding import topology
from celery_sharding.errors import GroupInUse, TopologyError
from celery_sharding.layout.cleanup import delete_group
from celery_sharding.layout.contents import existing_queues, group_exists, holds_tasks
from celery_sharding.layout.lock import GroupLock, LockedLayout, locked_layout
from celery_sharding.monitoring.ownership import listen_for_vitals
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.rabbitmq.queues import count_consumers, count_ready, queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import Names

_LOCK_SECONDS = 10.0
# A message that the broker routes while the exchange is deleted reaches its queue within this time.
_SETTLING_SECONDS = 1.0
# Workers that follow the group write to the journal once a second, even if they consume nothing of it.
_LISTEN_SECONDS = 2.5


def check_removable(connect: Connect, group: str) -> None:
    """Raise what `remove_group` would, and change nothing."""
    with _locked(connect, group) as locked:
        _check(locked)


def remove_group(connect: Connect, group: str) -> None:
    """Delete everything of a group from the broker, its history included.

    Raises:
        GroupInUse: Something waits, or a worker follows the group; `obstacles` says what and where. All is kept.
        TopologyError: The broker knows no such group, or a switch is under way.
        LockHeld, LockLost, BrokerUnavailable: As for the lock.
    """
    with _locked(connect, group) as locked:
        _check(locked)
        with _closed(locked):
            time.sleep(_SETTLING_SECONDS)
            _refuse(locked.names, _find_waiting(locked))
        delete_group(locked.connection, group)


@contextlib.contextmanager
def _locked(connect: Connect, group: str) -> Iterator[LockedLayout]:
    names = Names(group)
    with (
        # A replay holds dead letters that nobody else sees.
        GroupLock(connect, names, timeout_seconds=_LOCK_SECONDS, queue=names.dead_admin),
        locked_layout(connect, group, timeout_seconds=_LOCK_SECONDS, allow_undeclared=True) as locked,
    ):
        if not group_exists(locked.connection, names):
            raise TopologyError(
                f"no such group on the broker: nothing there is called {names.publish} or begins with it",
                group=group,
            )
        yield locked


def _check(locked: LockedLayout) -> None:
    workers: set[str] = set()
    if queue_exists(locked.connection, locked.names.journal):
        vitals = listen_for_vitals(locked.connection, locked.names, seconds=_LISTEN_SECONDS)
        workers = {each.by for each in vitals}
    _refuse(locked.names, [f"worker {worker} follows it" for worker in sorted(workers)] + _find_waiting(locked))


def _refuse(names: Names, obstacles: list[str]) -> None:
    if obstacles:
        raise GroupInUse(
            f"group {names.group!r} is in use, and nothing was removed: {'; '.join(obstacles)}",
            group=names.group,
            obstacles=tuple(obstacles),
        )


def _find_waiting(locked: LockedLayout) -> list[str]:
    """Return what is in the way of a removal: consumers of the group's queues, and what waits there."""
    connection, names, layout = locked.connection, locked.names, locked.layout
    found = []
    for queue in existing_queues(connection, names, layout):
        if count_consumers(connection, queue):
            found.append(f"{queue} has a consumer")
        elif holds_tasks(connection, queue):
            found.append(f"messages wait in {queue}, about {count_ready(connection, queue) or 1}")
    if queue_exists(connection, names.dead):
        if count_consumers(connection, names.dead):
            found.append(f"{names.dead} has a consumer")
        with brief_channel(connection) as channel:
            letter = channel.basic_get(names.dead)
            if letter is not None:
                found.append(f"dead letters: {letter.delivery_info['message_count'] + 1}")
    return found


@contextlib.contextmanager
def _closed(locked: LockedLayout) -> Iterator[None]:
    """Delete the publishers' exchange; declare and bind it as it was if the block fails."""
    connection, names, layout = locked.connection, locked.names, locked.layout
    existed = topology.fixed_exists(connection, names)
    with brief_channel(connection) as channel, explained(names.group, names.publish):
        channel.exchange_delete(names.publish)
    try:
        yield
    except BaseException:
        if existed:
            # If the connection is lost, a worker or `shards declare` does it.
            with contextlib.suppress(AMQPError, OSError), brief_channel(connection) as channel:
                topology.declare_entrance(channel, names.group)
                ring = layout.generation if not layout.cut_off else 0
                if ring and topology.ring_exists(connection, names, ring):
                    channel.exchange_bind(names.ring(ring), names.publish, "")
        raise
