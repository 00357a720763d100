"""How the groups are doing at one moment: the one source of what the command line, Flower, metrics and doctor show.

    manifest         what there is: generation, chain of segments, a switch that is under way
    passive counts   what waits in the queues: without what consumers hold, but with markers and probes
    journal          who owns what, and how it fares, from the vitals that each worker writes once a second
    management API   if the settings name it: unacknowledged messages and replicas, as the broker says

`read_snapshot` reads them. `derive_status` derives what is shown, without a broker. `status` has the values, and
`shard_state` the states. Nothing is changed on the broker, except that a nonce marks the end of each log.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from amqp import exceptions as amqp_errors

from celery_sharding.errors import BrokerUnavailable, ManagementUnavailable
from celery_sharding.layout.manifest import load
from celery_sharding.layout.model import Layout
from celery_sharding.monitoring.management import Management, QueueFacts
from celery_sharding.monitoring.ownership import Ownership, read_ownership
from celery_sharding.monitoring.shard_state import Known, derive_flow, derive_lag, derive_state
from celery_sharding.monitoring.status import GroupStatus, Kind, SegmentStatus, ShardStatus, Snapshot
from celery_sharding.rabbitmq.channels import Opener
from celery_sharding.rabbitmq.queues import count_queues
from celery_sharding.topology import Names


def read_snapshot(connection: Opener, groups: Iterable[str], *, management: Management | None = None) -> Snapshot:
    """Read how `groups`, given by name, are doing. A group that the broker does not know is no error.

    Args:
        connection: Connected, and not read by an event loop.
        management: Asked, too; if it does not answer, that is no error.

    Raises:
        BrokerUnavailable: The connection was lost.
        LogError: A log could not be read.
        TopologyError: The broker's user may not read the group's queues.
    """
    names = tuple(groups)
    broker, management_error = ask_management(management, names)
    try:
        found = tuple(_read_group(connection, name, broker) for name in names)
    except (amqp_errors.ConnectionError, OSError) as exc:
        raise BrokerUnavailable(f"the broker was lost ({exc}); try again when it is back") from exc
    return Snapshot(time.time(), found, management_error)


def ask_management(management: Management | None, groups: Iterable[str]) -> tuple[dict[str, QueueFacts], str]:
    """Return the management API's facts of the groups' queues, or why there are none ("": it is not configured)."""
    found: dict[str, QueueFacts] = {}
    if management is None:
        return found, ""
    try:
        for group in groups:
            found |= management.read_queues(Names(group))
    except ManagementUnavailable as exc:
        return {}, str(exc)
    return found, ""


def derive_status(
    names: Names,
    layout: Layout,
    *,
    ready: Mapping[str, int | None],
    consumers: Mapping[str, int],
    ownership: Ownership,
    now: float,
    counted: Sequence[tuple[float, Mapping[str, int | None]]] = (),
    broker: Mapping[str, QueueFacts] | None = None,
) -> GroupStatus:
    """Return the status of a group.

    Args:
        ready: Waiting messages by queue; a queue that is missing here or None does not exist.
        consumers: How many consumers each queue has, owner and standbys, by the broker's count.
        counted: What `ready` was earlier, as (seconds ago, messages by queue), oldest first.
        broker: What the management API says of each queue; None if it was not asked.
    """
    if not layout.limbo:
        return GroupStatus(names.group, protocol=layout.protocol)
    broker = broker or {}
    live: list[ShardStatus] = []
    earlier: list[ShardStatus] = []
    for segment in layout.segments:
        is_live = segment.kind == "ring" and segment.number == layout.generation
        kind: Kind = "live" if is_live else "limbo" if segment.kind == "limbo" else "old"
        for index, queue in enumerate(segment.queues(names)):
            if is_live or queue not in segment.drained:
                known = Known(
                    ready=ready.get(queue),
                    consumers=consumers.get(queue, 0),
                    owner=ownership.owners.get(queue),
                    before=ownership.before.get(queue),
                    last=ownership.last.get(queue),
                    standbys=ownership.standbys.get(queue, ()),
                    counted=[(ago, count) for ago, counts in counted if (count := counts.get(queue)) is not None],
                )
                in_turn = segment in layout.open_segments
                paused = layout.pauses(segment, index)
                facts = broker.get(queue)
                row = _derive_row(kind, index, queue, known, facts, now, in_turn=in_turn, paused=paused)
                (live if is_live else earlier).append(row)
    return GroupStatus(
        names.group,
        declared=True,
        generation=layout.generation,
        shards=tuple(live),
        earlier=tuple(earlier),
        segments=tuple(SegmentStatus(s.name, s.ended, s.is_drained, len(s.unfinished)) for s in layout.segments),
        switch=layout.switch,
        limbo_ready=ready.get(names.limbo(layout.limbo)) or 0,
        dead_letters=ready.get(names.dead) or 0,
        paused=None in layout.paused,
        protocol=layout.protocol,
    )


def _read_group(connection: Opener, name: str, broker: Mapping[str, QueueFacts]) -> GroupStatus:
    names = Names(name)
    layout = load(connection, names)
    if not layout.limbo:
        return GroupStatus(name, protocol=layout.protocol)
    ready, consumers = count_queues(connection, name, counted_queues(names, layout))
    in_turn = [queue for segment in layout.open_segments for queue in segment.queues(names)]
    ownership = read_ownership(connection, names, backlogged=[queue for queue in in_turn if ready.get(queue)])
    return derive_status(
        names, layout, ready=ready, consumers=consumers, ownership=ownership, now=time.time(), broker=broker
    )


def counted_queues(names: Names, layout: Layout) -> list[str]:
    """Return the queues whose messages are to be counted."""
    queues = [queue for segment in layout.segments for queue in segment.queues(names) if queue not in segment.drained]
    return [*queues, names.limbo(layout.limbo), names.dead]


def _derive_row(
    kind: Kind,
    index: int,
    queue: str,
    known: Known,
    facts: QueueFacts | None,
    now: float,
    *,
    in_turn: bool,
    paused: bool,
) -> ShardStatus:
    owner, last = known.owner, known.last
    lag_seconds, lag_estimated = derive_lag(known, now)
    flow = derive_flow(known)
    held = None if owner is None else owner.held
    return ShardStatus(
        kind=kind,
        index=index,
        queue=queue,
        state=derive_state(known, live=kind == "live", in_turn=in_turn, paused=paused),
        ready=known.ready,
        held=held,
        running=None if owner is None else owner.running,
        owner=None if owner is None else owner.owner,
        standbys=known.standbys,
        lag_seconds=lag_seconds,
        lag_estimated=lag_estimated,
        since=owner.since if owner is not None else None if last is None else last.at,
        in_rate=flow.in_rate,
        out_rate=flow.out_rate,
        clear_seconds=flow.clear_seconds((known.ready or 0) + (held or 0)),
        counters={} if owner is None else owner.counters,
        broker=facts,
        store_waiting=0 if owner is None else owner.store_waiting,
        store_away_since=None if owner is None else owner.store_away_since,
        claim_waiting=0 if owner is None else owner.claim_waiting,
    )
