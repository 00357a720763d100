"""How the groups are doing at one moment: the one source of what the faces show.

    manifest         what there is: generation, chain of segments, a switch that is under way
    passive counts   what waits in the queues; consumers' messages are not in it, markers and probes are
    journal          who owns what, and how it fares, from the vitals that each worker writes once a second

`read_snapshot` reads the three; `judge_group` makes of them what is shown, and knows no broker. Nothing is changed on
the broker but for the nonces by which the ends of the logs are found.

States of a shard, the first that fits:

    waiting      an earlier segment of the chain is not drained yet: nobody consumes it, on purpose
    missing      its queue is gone, or out of reach
    paused       an operator paused it, or the group: nothing of it starts until it is resumed
    stuck        its last owner says nothing any more, and is connected still: it hangs, is stopped, or runs a long task
                 in a solo pool
    unowned      no worker reports to own it
    draining     a queue of an earlier segment, on its way out
    no standby   its owner is the only one who consumes it
    idle         nothing to do
    ok
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from amqp import exceptions as amqp_errors

from celery_sharding.admin.vitals import Vital, Vitals, read_vitals
from celery_sharding.errors import BrokerUnavailable
from celery_sharding.layout import Layout, OpenSwitch
from celery_sharding.manifest import load
from celery_sharding.topology import Names, Opener, brief_channel, explained

SCHEMA = 1
# By then a broker has noticed that a lost owner is gone, and what it held is counted as ready again.
_RETURNED_SECONDS = 90.0

Kind = Literal["live", "old", "limbo"]


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One queue of a group.

    Attributes:
        kind: "live": a shard of the live generation; "old", "limbo": of an earlier segment, not drained yet.
        ready: Messages in the queue that no worker holds; a hint, brokers count late. None: no such queue.
        held: Messages that the owner was delivered and has not settled, of which `running` run. None without an owner.
        lag_seconds: Age of the oldest waiting message; None if it is not known.
        lag_estimated: It is the last known age and the time since, because there is no owner to ask.
        since: When the owner took it, or, without one, when the last was heard; seconds since the epoch.
        in_rate: Messages a second that came, over the last seconds; None: not known.
        out_rate: Messages a second that were settled, over the last seconds; None: not known, or nobody owns it.
        rates_estimated: `in_rate` is the mean since the oldest waiting message was published.
        clear_seconds: Until nothing waits, at these rates; None: not known, or it does not shrink.
        counters: What the owner counted since it took it: delivered, done, failed, retried, …
    """

    kind: Kind
    index: int
    queue: str
    state: str
    ready: int | None
    held: int | None
    running: int | None
    owner: str | None
    standbys: tuple[str, ...]
    lag_seconds: float | None
    lag_estimated: bool
    since: float | None
    in_rate: float | None = None
    out_rate: float | None = None
    rates_estimated: bool = False
    clear_seconds: float | None = None
    counters: Mapping[str, int] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """Messages that are not settled: ready, or held by the owner."""
        return (self.ready or 0) + (self.held or 0)


@dataclass(frozen=True, slots=True)
class SegmentStatus:
    """A segment of the chain. `unfinished_keys` wait there for a retry, while the next segment is consumed."""

    name: str
    ended: bool
    drained: bool
    unfinished_keys: int


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group.

    Attributes:
        declared: Whether the broker knows it.
        generation: The live one; 0: none yet.
        shards: The queues of the live generation, in the order of their index.
        earlier: The queues of earlier segments that are not drained, in the order of consumption.
        segments: The chain.
        switch: The one that is under way.
        limbo_ready: Messages that came since the ring was lost, or before the first worker.
        dead_letters: Messages in the dead-letter queue.
        paused: The whole group is paused; single shards have the state "paused".
    """

    name: str
    declared: bool = False
    generation: int = 0
    shards: tuple[ShardStatus, ...] = ()
    earlier: tuple[ShardStatus, ...] = ()
    segments: tuple[SegmentStatus, ...] = ()
    switch: OpenSwitch | None = None
    limbo_ready: int = 0
    dead_letters: int = 0
    paused: bool = False

    @property
    def rows(self) -> tuple[ShardStatus, ...]:
        """All queues in the order of consumption."""
        return self.earlier + self.shards

    @property
    def ready(self) -> int:
        """Messages that wait anywhere in the group."""
        return sum(row.ready or 0 for row in self.rows) + self.limbo_ready

    @property
    def unowned(self) -> int:
        """How many of its queues nobody owns, though they are to be consumed."""
        return sum(row.state == "unowned" for row in self.rows)

    @property
    def skew(self) -> float | None:
        """The load of the busiest shard over an even share of all; 1 is even. None: there is next to no load.

        The load of a shard is what waits in it and what comes in a second.
        """
        loads = [row.waiting + (row.in_rate or 0.0) for row in self.shards]
        return max(loads) * len(loads) / sum(loads) if sum(loads) >= max(1, len(loads)) else None

    @property
    def worst_lag(self) -> ShardStatus | None:
        """The row with the largest lag; None if no lag is known."""
        known = [row for row in self.rows if row.lag_seconds is not None]
        return max(known, key=lambda row: row.lag_seconds or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The groups as they were at `taken_at`, in seconds since the epoch."""

    taken_at: float
    groups: tuple[GroupStatus, ...]


def read_snapshot(connection: Opener, groups: Iterable[str]) -> Snapshot:
    """Read how `groups`, given by name, are doing. Only reads; a group that the broker does not know is no error.

    Args:
        connection: Connected, and not read by an event loop.

    Raises:
        BrokerUnavailable: The connection was lost.
        LogError: A log could not be read.
        TopologyError: The broker's user may not read the group's queues.
    """
    try:
        found = tuple(_read_group(connection, name) for name in groups)
    except (amqp_errors.ConnectionError, OSError) as exc:
        raise BrokerUnavailable(f"the broker was lost ({exc}); try again when it is back") from exc
    return Snapshot(time.time(), found)


def judge_group(
    names: Names,
    layout: Layout,
    *,
    ready: Mapping[str, int | None],
    consumers: Mapping[str, int],
    vitals: Vitals,
    now: float,
) -> GroupStatus:
    """Return the status of a group.

    Args:
        ready: Waiting messages by queue; a queue that is missing here or None does not exist.
        consumers: How many consumers each queue has, its owner and the standbys, by the broker's word.
    """
    if not layout.limbo:
        return GroupStatus(names.group)
    live: list[ShardStatus] = []
    earlier: list[ShardStatus] = []
    for segment in layout.segments:
        is_live = segment.kind == "ring" and segment.number == layout.generation
        kind: Kind = "live" if is_live else "limbo" if segment.kind == "limbo" else "old"
        for index, queue in enumerate(segment.queues(names)):
            if is_live or queue not in segment.drained:
                count = (ready.get(queue), consumers.get(queue, 0))
                in_turn = segment in layout.open_segments
                paused = None in layout.paused or (is_live and layout.is_paused(index))
                row = _judge_queue(kind, index, queue, count, vitals, now, in_turn=in_turn, paused=paused)
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
    )


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return the snapshot in the shape that programs are promised; moments are ISO 8601 in UTC."""
    return {
        "schema": SCHEMA,
        "at": _moment(snapshot.taken_at),
        "groups": [_group_to_json(group) for group in snapshot.groups],
    }


def judge_now(connection: Opener, names: Names, layout: Layout, vitals: Vitals) -> GroupStatus:
    """Count what waits, and return the group's status. Errors as for `read_snapshot`, but for LogError."""
    ready, consumers = _count(connection, names.group, _queues(names, layout))
    return judge_group(names, layout, ready=ready, consumers=consumers, vitals=vitals, now=time.time())


def _read_group(connection: Opener, name: str) -> GroupStatus:
    names = Names(name)
    layout = load(connection, names)
    if not layout.limbo:
        return GroupStatus(name)
    ready, consumers = _count(connection, name, _queues(names, layout))
    in_turn = [queue for segment in layout.open_segments for queue in segment.queues(names)]
    vitals = read_vitals(connection, names, backlogged=[queue for queue in in_turn if ready.get(queue)])
    return judge_group(names, layout, ready=ready, consumers=consumers, vitals=vitals, now=time.time())


def _queues(names: Names, layout: Layout) -> list[str]:
    """Return the queues whose messages count."""
    queues = [queue for segment in layout.segments for queue in segment.queues(names) if queue not in segment.drained]
    return [*queues, names.limbo(layout.limbo), names.dead]


def _count(connection: Opener, group: str, queues: Iterable[str]) -> tuple[dict[str, int | None], dict[str, int]]:
    """Return the waiting messages of each queue (None: it is gone, or out of reach), and its consumers."""
    ready: dict[str, int | None] = {}
    consumers: dict[str, int] = {}
    with brief_channel(connection) as channel:  # one for all, to be fast
        for queue in queues:
            with explained(group, queue):
                try:
                    found = channel.queue_declare(queue, passive=True)
                except amqp_errors.NotFound:
                    # The broker has closed the channel; py-amqp has opened it again before it raised this.
                    ready[queue] = None
                else:
                    ready[queue], consumers[queue] = int(found.message_count), int(found.consumer_count)
    return ready, consumers


def _judge_queue(
    kind: Kind,
    index: int,
    queue: str,
    count: tuple[int | None, int],
    vitals: Vitals,
    now: float,
    *,
    in_turn: bool,
    paused: bool,
) -> ShardStatus:
    ready, consumers = count
    owner, last = vitals.owners.get(queue), vitals.last.get(queue)
    standbys = vitals.standbys.get(queue, ())
    if not in_turn:
        state = "waiting"
    elif ready is None:
        state = "missing"
    elif paused:
        state = "paused"
    elif owner is None and last is not None and consumers > len(standbys):
        state = "stuck"
    elif owner is None:
        state = "unowned"
    elif kind != "live":
        state = "draining"
    elif not standbys:
        state = "no standby"
    else:
        state = "ok" if ready or owner.held else "idle"
    lag_seconds, lag_estimated = _judge_lag(ready, owner, last, now)
    return ShardStatus(
        kind=kind,
        index=index,
        queue=queue,
        state=state,
        ready=ready,
        held=None if owner is None else owner.held,
        running=None if owner is None else owner.running,
        owner=None if owner is None else owner.owner,
        standbys=standbys,
        lag_seconds=lag_seconds,
        lag_estimated=lag_estimated,
        since=owner.since if owner is not None else None if last is None else last.at,
        counters={} if owner is None else owner.counters,
    )


def _judge_lag(ready: int | None, owner: Vital | None, last: Vital | None, now: float) -> tuple[float | None, bool]:
    """Return the age of the oldest waiting message, None if unknown, and whether it is an estimate."""
    if ready is None:
        return None, False
    if owner is not None:
        if owner.lag_seconds is not None or not ready:
            return owner.lag_seconds or 0.0, False
        # What the owner was not delivered yet: it has just come, unless the owner holds all that it may.
        return (None, False) if owner.held else (0.0, True)
    if last is not None and (ready or (last.held and now - last.at < _RETURNED_SECONDS)):
        return (last.lag_seconds or 0.0) + max(0.0, now - last.at), True
    return (None, False) if ready else (0.0, False)


def _group_to_json(group: GroupStatus) -> dict[str, Any]:
    switch = group.switch
    return {
        "name": group.name,
        "declared": group.declared,
        "generation": group.generation,
        "ready": group.ready,
        "limbo_ready": group.limbo_ready,
        "dead_letters": group.dead_letters,
        "paused": group.paused,
        "skew": _round(group.skew),
        "switch": None if switch is None else {k: getattr(switch, k) for k in ("kind", "generation", "shards", "step")},
        "segments": [dataclasses.asdict(segment) for segment in group.segments],
        "shards": [_row_to_json(row) for row in group.shards],
        "earlier": [_row_to_json(row) for row in group.earlier],
    }


def _row_to_json(row: ShardStatus) -> dict[str, Any]:
    return dataclasses.asdict(row) | {
        "standbys": list(row.standbys),
        **{name: _round(getattr(row, name)) for name in ("lag_seconds", "in_rate", "out_rate", "clear_seconds")},
        "since": None if row.since is None else _moment(row.since),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
