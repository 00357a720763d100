"""What is shown of the groups at one moment: values that know no broker.

`snapshot` makes them; the command line, Flower, metrics, `doctor` and the health check show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from celery_sharding.layout.model import OpenSwitch
from celery_sharding.monitoring.management import QueueFacts
from celery_sharding.topology import Names

Kind = Literal["live", "old", "limbo"]


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One queue of a group.

    Attributes:
        kind: "live": a shard of the live generation; "old", "limbo": of an earlier segment, not drained yet.
        ready: Messages in the queue that no worker holds, about, since brokers count late. None: no such queue.
        held: Messages that the owner was delivered and has not settled, of which `running` run. None without an owner.
        lag_seconds: Age of the oldest waiting message; None if it is not known.
        lag_estimated: It is the last known age plus the time since, because there is no owner to ask.
        since: When the owner took it, or, without one, when the last one was heard; seconds since the epoch.
        in_rate: Messages a second that came, over the last seconds; None: not known. Under a backlog, a single snapshot
            shows the mean since the newest message that the owner held was published.
        out_rate: Messages a second that were settled, over the last seconds; None: not known, or nobody owns it.
        clear_seconds: Until nothing waits, at these rates; None: not known, or it does not shrink.
        counters: What the owner counted since it took it: delivered, done, failed, retried, …
        broker: What the management API says of the queue; None if it was not asked, or does not know it.
        store_waiting: Messages that wait at the heads of their lanes for the claim store.
        store_away_since: Since when it has not answered, in seconds since the epoch; None if nothing waits for it.
        claim_waiting: Messages that wait at the heads of their lanes for a claim that another run holds.
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
    store_waiting: int = 0
    store_away_since: float | None = None
    claim_waiting: int = 0

    @property
    def unacknowledged(self) -> int | None:
        """Messages delivered and not settled: as the broker says, else as the owner does; None: not known."""
        counted = None if self.broker is None else self.broker.unacknowledged
        return self.held if counted is None else counted

    @property
    def waiting(self) -> int:
        """Messages that are not settled: ready, or held by the owner."""
        return (self.ready or 0) + (self.held or 0)


@dataclass(frozen=True, slots=True)
class SegmentStatus:
    """A segment of the chain. `unfinished_keys` wait there for a retry while the next segment is consumed."""

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
        protocol: What a version must know to act on it; above `PROTOCOL`, this one leaves it alone.
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
    protocol: int = 1

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
        """How many of its queues should be consumed, but have no owner."""
        return sum(row.state == "unowned" for row in self.rows)

    @property
    def store_away_since(self) -> float | None:
        """Since when messages of it wait for the claim store; None: none does."""
        return min((row.store_away_since for row in self.rows if row.store_away_since is not None), default=None)

    @property
    def skew(self) -> float | None:
        """The load of the busiest shard over an even share of all; 1 is even. None: there is hardly any load.

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

    `management_error` says why the management API, if it is configured, did not answer.
    """

    taken_at: float
    groups: tuple[GroupStatus, ...]
    management_error: str = ""
