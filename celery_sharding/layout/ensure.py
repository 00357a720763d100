"""Making a group's layout whole: the first start, and recovery of a lost ring.

`find_fault` only looks. `ensure_group` and `ensure_fixed` repair what it finds: they declare the fixed part, carry on a
switch that someone began, adopt what the manifest forgot (`adoption`), recover a lost ring (`switch`), and give every
segment before the last its end markers (`end_markers`). A segment is never ended while a switch is open.

Every repair happens under the group's lock, on the lock's connection, after the manifest was read again. That holds for
the fixed part, too: a slow publisher would otherwise bind a limbo that the group has left.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from amqp import exceptions as amqp_errors

from celery_sharding import topology
from celery_sharding.config import ShardGroup
from celery_sharding.errors import (
    BrokerUnavailable,
    LockHeld,
    LockLost,
    ManifestConflict,
    OutOfReach,
    ShardingError,
    TopologyError,
    TopologyMismatch,
)
from celery_sharding.layout.adoption import adopt_unknown, exists_beyond, first_existing
from celery_sharding.layout.end_markers import end_segment
from celery_sharding.layout.events import Created
from celery_sharding.layout.lock import GroupLock, LockedLayout, locked_layout, reachable
from celery_sharding.layout.manifest import load, load_to_write, write
from celery_sharding.layout.model import Layout
from celery_sharding.layout.protocol import check_protocol
from celery_sharding.layout.switch import GRACE_SECONDS, begin_recovery, carry_on
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.connect import Connect, close_connection, open_connection
from celery_sharding.rabbitmq.pipelining import Look, declare_at_once, exist_at_once
from celery_sharding.rabbitmq.queues import count_ready, existing_queues
from celery_sharding.rabbitmq.refusals import is_out_of_reach
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)

_TURN_SECONDS = 2.0
_PASSING_SECONDS = 0.3
_ROUNDS_MAX = 5
# How far beyond the manifest to look for queues it does not know; all the way if it knows nothing.
_PROBE_AHEAD, _PROBE_ALL = 5, 999


def ensure_group(
    connect: Connect,
    group: ShardGroup,
    *,
    owner: str,
    wait_seconds: float = 30.0,
    known: Layout | None = None,
    log: logging.Logger = logger,
) -> Layout:
    """Make the group ready for its workers, and return its layout. Quick, and without the lock, when all is well.

    Args:
        owner: Who does it; stands in the manifest.
        wait_seconds: How long to wait for the lock, and for queues whose node is starting or that have no leader.
        known: The layout as the caller tails it; saves reading the manifest. May be a little old.
        log: Gets one line for each change.

    Raises:
        TopologyMismatch: What stands on the broker was made with other options.
        ProtocolTooOld: A newer version acts on the group, and this one leaves it alone.
        PluginMissing: The broker has no consistent-hash exchange.
        LockHeld: Another process held the lock all the time.
        OutOfReach: A broker node that has the group's queues did not come up.
        BrokerUnavailable: The broker could not be reached, or was lost on the way.
        TopologyError: Anything else; the next call carries on what was begun.
    """
    names = Names(group.name)
    turns = Turns(wait_seconds)
    while True:
        try:
            with _connected(connect, group.name, first_node=turns.node) as connection:
                layout, known = known or load(connection, names), None
                check_protocol(group.name, layout.protocol)
                check_queue_type(group, layout)
                if find_fault(connection, names, layout) is None:
                    return layout
            with locked_layout(
                connect,
                group.name,
                timeout_seconds=turns.lock_seconds,
                first_node=turns.node,
                allow_switch=True,
                allow_undeclared=True,
            ) as locked:
                return _repair(locked, group, owner, log)
        except ShardingError as exc:
            turns.pass_on(exc)


def ensure_fixed(connect: Connect, group: ShardGroup, *, owner: str, wait_seconds: float = 30.0) -> None:
    """Make the group ready for publishers: what they publish is kept, even if no worker ever ran.

    Args:
        wait_seconds: How long to try, and to wait for all of the broker's answers together.

    Raises:
        As for `ensure_group`, but for PluginMissing.
    """
    names = Names(group.name)
    turns = Turns(wait_seconds)
    is_first = True
    while True:
        try:
            if not is_first:
                with _connected(connect, group.name, first_node=turns.node, deadline=turns.deadline) as connection:
                    if topology.fixed_exists(connection, names):
                        return
            is_first = False
            lock = GroupLock(
                connect,
                names,
                timeout_seconds=turns.lock_seconds,
                first_node=turns.node,
                deadline=turns.deadline,
            )
            with lock, lock.operation() as connection:
                looks = Look(names.publish, "fanout"), Look(names.manifest)
                fixed, manifest = exist_at_once(connection, looks)
                if fixed is not None and not is_out_of_reach(fixed):
                    is_new = manifest is not None and not is_out_of_reach(manifest)
                    _declare_fixed(connection, group, Layout() if is_new else load_to_write(connection, names), owner)
            return
        except ShardingError as exc:
            turns.pass_on(exc)


def find_fault(connection: Opener, names: Names, layout: Layout) -> str | None:
    """Return what keeps the group from working, in words; None if nothing does. Changes nothing."""
    if not topology.fixed_exists(connection, names):
        return "its exchanges do not exist"
    if layout.limbo == 0:
        return "its manifest is empty"
    if gone := _missing_logs(connection, names):
        return f"{', '.join(gone)} are gone"
    if layout.switch is not None:
        return f"the switch to g{layout.generation:03d} is open at step {layout.switch.step}"
    if layout.generation == 0:
        return "no worker ever ran"
    if layout.cut_off:
        return "its exchanges were declared anew"
    if not topology.ring_exists(connection, names, layout.generation):
        return f"the ring g{layout.generation:03d} is gone"
    if missing := topology.missing_shards(connection, names, layout.generation, layout.shards):
        return f"the shard queues {', '.join(map(str, missing))} of g{layout.generation:03d} are gone"
    if exists_beyond(connection, names, layout):
        return "the broker holds queues that the manifest does not know"
    waiting = count_ready(connection, names.limbo(layout.limbo))
    if waiting != 0:
        return f"limbo{layout.limbo:03d} {'is gone' if waiting is None else 'takes messages'}"
    if layout.unended:
        return f"{', '.join(segment.name for segment in layout.unended)} lack end markers"
    return None


class Turns:
    """The tries of one call, for `wait_seconds` in all.

    Each looks again, since whoever holds the lock is most likely doing what the caller wants. After a failure the next
    one begins with another node of the broker.
    """

    def __init__(self, wait_seconds: float) -> None:
        self.deadline = time.monotonic() + wait_seconds
        self.node = 0

    @property
    def lock_seconds(self) -> float:
        """How long this one may wait for the lock."""
        return min(max(self.deadline - time.monotonic(), 0.0), _TURN_SECONDS)

    def pass_on(self, error: ShardingError) -> None:
        """Go on to the next one, in a moment, or raise `error` if that would not help, or the time is over."""
        is_held = isinstance(error, LockHeld)
        if time.monotonic() >= self.deadline or not (is_held or passes_by_itself(error)):
            raise error
        if not is_held:
            self.node += 1
            time.sleep(_PASSING_SECONDS)


def passes_by_itself(error: ShardingError) -> bool:
    """Tell whether trying again may help: a node or a leader is missing for a moment, or the manifest moved on."""
    return isinstance(error, OutOfReach | LockLost | ManifestConflict) or bool(error.facts.get("passes"))


def _repair(locked: LockedLayout, group: ShardGroup, by: str, log: logging.Logger) -> Layout:
    """Repair, one after the other, what `find_fault` finds; return the layout in which it finds nothing."""
    connection, layout = locked.connection, locked.layout
    check_queue_type(group, layout)
    for _ in range(_ROUNDS_MAX):
        fault = find_fault(connection, locked.names, layout)
        if fault is None:
            return layout
        before = layout.generation
        layout = _repair_once(connection, group, layout, by)
        if layout.generation != before:
            log.log(
                logging.WARNING if before else logging.INFO,
                "group %s: %s; from now on its messages go to generation %d (%d shards)",
                group.name,
                fault,
                layout.generation,
                layout.shards,
            )
    raise TopologyError(
        f"group {group.name!r} could not be repaired: {fault}; read the broker's log, and check whether someone "
        "deletes its queues or exchanges",
        group=group.name,
    )


def _repair_once(connection: Opener, group: ShardGroup, layout: Layout, by: str) -> Layout:
    names = Names(group.name)
    ahead = _PROBE_AHEAD
    if not topology.fixed_exists(connection, names):
        layout = _declare_fixed(connection, group, layout, by)
    elif layout.limbo == 0:
        topology.check_fixed(connection, group)
        ahead = _PROBE_ALL
        layout = _record_created(connection, group, layout, by, ahead)
    elif _missing_logs(connection, names):
        with brief_channel(connection) as channel:
            topology.declare_logs(channel, group.name)
    if layout.switch is None:
        layout = adopt_unknown(connection, group, layout, by, ahead)
    layout = carry_on(connection, group, layout, by=by)
    if _needs_ring(connection, names, layout):
        layout = carry_on(connection, group, begin_recovery(connection, group, layout, by=by), by=by)
    if layout.unended:
        time.sleep(GRACE_SECONDS)
        for segment in layout.unended:
            layout = end_segment(connection, names, layout, segment, by=by)
    return layout


def _missing_logs(connection: Opener, names: Names) -> list[str]:
    logs = (names.journal, names.attempts, names.dead)
    existing = existing_queues(connection, logs)
    return [queue for queue in logs if queue not in existing]


def _needs_ring(connection: Opener, names: Names, layout: Layout) -> bool:
    return (
        layout.generation == 0
        or layout.cut_off
        or not topology.ring_exists(connection, names, layout.generation)
        or bool(topology.missing_shards(connection, names, layout.generation, layout.shards))
        or count_ready(connection, names.limbo(layout.limbo)) != 0
    )


def _declare_fixed(connection: Opener, group: ShardGroup, layout: Layout, by: str) -> Layout:
    layout = _record_created(connection, group, layout, by, _PROBE_AHEAD)
    declare_at_once(connection, partial(topology.declare_fixed, group=group, limbo=layout.limbo))
    return layout


def _record_created(connection: Opener, group: ShardGroup, layout: Layout, by: str, ahead: int) -> Layout:
    declare_at_once(connection, partial(topology.declare_logs, group=group.name))
    if layout.limbo and (layout.generation == 0 or layout.cut_off):
        return layout  # recorded by someone who did not get to the end of it
    names = Names(group.name)
    known = [names.limbo(number) for number in range(1, ahead + 1)]
    limbo = layout.limbo or 1 + (first_existing(connection, known) or 0)
    return write(connection, names, layout, Created(limbo), by=by)


def check_queue_type(group: ShardGroup, layout: Layout) -> None:
    """Raise `TopologyMismatch` if the live queues are of another type than the group's."""
    live = layout.segment(f"g{layout.generation:03d}")
    if live is not None and live.queue_type != group.queue_type:
        raise TopologyMismatch(
            f"group {group.name!r} has {live.queue_type} queues on the broker, but {group.queue_type} is configured; "
            f"set queue_type={live.queue_type!r}, or choose another name for a group of {group.queue_type} queues",
            group=group.name,
            actual=live.queue_type,
            expected=group.queue_type,
        )


@contextlib.contextmanager
def _connected(connect: Connect, group: str, *, first_node: int, deadline: float | None = None) -> Iterator[Any]:
    with reachable(group):
        connection = open_connection(connect(), first_node=first_node, deadline=deadline)
    try:
        yield connection
    except (amqp_errors.ConnectionError, OSError) as exc:
        raise BrokerUnavailable(f"the broker of group {group!r} was lost ({exc})", group=group, passes=True) from exc
    finally:
        close_connection(connection)
