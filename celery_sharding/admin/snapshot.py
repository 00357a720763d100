"""How the groups are doing at one moment: the one source of what the faces show.

    manifest         what there is: generation, chain of segments, a switch that is under way
    passive counts   what waits in the queues; consumers' messages are not in it, markers and probes are
    journal          who owns what, and how it fares, from the vitals that each worker writes once a second
    management API   if the settings name it: the broker's word on what is unacknowledged, and on replicas

`read_snapshot` reads them; `judge_group` makes of them what is shown, and knows no broker; `judging` has the states.
Nothing is changed on the broker but for the nonces by which the ends of the logs are found.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from amqp import exceptions as amqp_errors

from celery_sharding.admin.counting import count_queues
from celery_sharding.admin.judging import Known, judge_flow, judge_lag, judge_state
from celery_sharding.admin.management import Management, QueueFacts
from celery_sharding.admin.vitals import Vitals, read_vitals
from celery_sharding.errors import BrokerUnavailable, ManagementUnavailable
from celery_sharding.layout import Layout, OpenSwitch
from celery_sharding.manifest import load
from celery_sharding.topology import Names, Opener

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
        in_rate: Messages a second that came, over the last seconds; None: not known. Under a backlog, who looks but
            once is told the mean since the newest message that the owner was delivered was published.
        out_rate: Messages a second that were settled, over the last seconds; None: not known, or nobody owns it.
        clear_seconds: Until nothing waits, at these rates; None: not known, or it does not shrink.
        counters: What the owner counted since it took it: delivered, done, failed, retried, …
        broker: What the management API says of the queue; None if it was not asked, or does not know it.
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
    clear_seconds: float | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    broker: QueueFacts | None = None

    @property
    def unacknowledged(self) -> int | None:
        """Messages delivered and not settled: by the broker's word, else by the owner's; None if nobody says."""
        counted = None if self.broker is None else self.broker.unacknowledged
        return self.held if counted is None else counted

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

    def label(self, row: ShardStatus) -> str:
        """Return how `row` is called in the group: its index, or of an earlier segment `limbo001`, `g001.003`."""
        return str(row.index) if row.kind == "live" else row.queue.removeprefix(f"{Names(self.name).publish}.")

    @property
    def worst_lag(self) -> ShardStatus | None:
        """The row with the largest lag; None if no lag is known."""
        known = [row for row in self.rows if row.lag_seconds is not None]
        return max(known, key=lambda row: row.lag_seconds or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The groups as they were at `taken_at`, in seconds since the epoch.

    `management_error` says why the management API, if it is configured, told nothing.
    """

    taken_at: float
    groups: tuple[GroupStatus, ...]
    management_error: str = ""


def read_snapshot(connection: Opener, groups: Iterable[str], *, management: Management | None = None) -> Snapshot:
    """Read how `groups`, given by name, are doing. Only reads; a group that the broker does not know is no error.

    Args:
        connection: Connected, and not read by an event loop.
        management: Asked, too; that it does not answer is no error.

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
    """Return what the management API says of the groups' queues, or why it says nothing ("": it is not configured)."""
    found: dict[str, QueueFacts] = {}
    if management is None:
        return found, ""
    try:
        for group in groups:
            found |= management.read_queues(Names(group))
    except ManagementUnavailable as exc:
        return {}, str(exc)
    return found, ""


def judge_group(
    names: Names,
    layout: Layout,
    *,
    ready: Mapping[str, int | None],
    consumers: Mapping[str, int],
    vitals: Vitals,
    now: float,
    counted: Sequence[tuple[float, Mapping[str, int | None]]] = (),
    broker: Mapping[str, QueueFacts] | None = None,
) -> GroupStatus:
    """Return the status of a group.

    Args:
        ready: Waiting messages by queue; a queue that is missing here or None does not exist.
        consumers: How many consumers each queue has, its owner and the standbys, by the broker's word.
        counted: What `ready` was earlier, as (seconds ago, messages by queue), the oldest first.
        broker: What the management API says of each queue; None if it was not asked.
    """
    if not layout.limbo:
        return GroupStatus(names.group)
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
                    owner=vitals.owners.get(queue),
                    before=vitals.before.get(queue),
                    last=vitals.last.get(queue),
                    standbys=vitals.standbys.get(queue, ()),
                    counted=[(ago, count) for ago, counts in counted if (count := counts.get(queue)) is not None],
                )
                in_turn = segment in layout.open_segments
                paused = layout.pauses(segment, index)
                facts = broker.get(queue)
                row = _judge_queue(kind, index, queue, known, facts, now, in_turn=in_turn, paused=paused)
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


def _read_group(connection: Opener, name: str, broker: Mapping[str, QueueFacts]) -> GroupStatus:
    names = Names(name)
    layout = load(connection, names)
    if not layout.limbo:
        return GroupStatus(name)
    ready, consumers = count_queues(connection, name, counted_queues(names, layout))
    in_turn = [queue for segment in layout.open_segments for queue in segment.queues(names)]
    vitals = read_vitals(connection, names, backlogged=[queue for queue in in_turn if ready.get(queue)])
    return judge_group(names, layout, ready=ready, consumers=consumers, vitals=vitals, now=time.time(), broker=broker)


def counted_queues(names: Names, layout: Layout) -> list[str]:
    """Return the queues whose messages count."""
    queues = [queue for segment in layout.segments for queue in segment.queues(names) if queue not in segment.drained]
    return [*queues, names.limbo(layout.limbo), names.dead]


def _judge_queue(
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
    lag_seconds, lag_estimated = judge_lag(known, now)
    flow = judge_flow(known)
    held = None if owner is None else owner.held
    return ShardStatus(
        kind=kind,
        index=index,
        queue=queue,
        state=judge_state(known, live=kind == "live", in_turn=in_turn, paused=paused),
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
    )
