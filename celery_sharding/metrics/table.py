"""Every metric: its name, its meaning, and where its value is in a snapshot or in the totals.

Labels are `group` and `shard` (on two of them also the worker or the state), never a key or a task id: metrics are
public, and every value of a label is a series for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from celery_sharding.dedup.notices import COMMIT_REFUSED, DEDUPLICATED
from celery_sharding.monitoring.status import GroupStatus, ShardStatus

PREFIX = "celery_sharding"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gauge(Generic[T]):
    """A gauge of each group or queue. `read` returns its value; None: it is not known, and not shown.

    With a `label`, the value of `read` stands in that label, and the gauge is 1.
    """

    name: str
    help: str
    read: Callable[[T], float | str | None]
    label: str | None = None


@dataclass(frozen=True, slots=True)
class ShardCounter:
    """What workers count as `counter`, by shard."""

    name: str
    help: str
    counter: str


UP = (f"{PREFIX}_up", "1 if the last snapshot of the groups is fresh; 0 if not")
AGE = (f"{PREFIX}_snapshot_age_seconds", "Age of the last snapshot of the groups; not shown before the first")
WAIT = (f"{PREFIX}_wait_seconds", "From publishing a message to the start of its first run by its owner")
RUN = (f"{PREFIX}_run_seconds", "From the start of a run to its end, retried runs included")
HANDOVERS = (f"{PREFIX}_handovers_total", "How often a worker became the owner of the shard")

GROUP_GAUGES: tuple[Gauge[GroupStatus], ...] = (
    Gauge(f"{PREFIX}_declared", "1 if the broker knows the group", lambda group: group.declared),
    Gauge(f"{PREFIX}_generation", "Number of the live generation; 0: none yet", lambda group: group.generation),
    Gauge(f"{PREFIX}_shards", "Shards of the live generation", lambda group: len(group.shards)),
    Gauge(f"{PREFIX}_group_paused", "1 if the whole group is paused", lambda group: group.paused),
    Gauge(f"{PREFIX}_dead_letters", "Messages in the dead-letter queue", lambda group: group.dead_letters),
    Gauge(
        f"{PREFIX}_limbo_waiting_messages",
        "Messages published while there was no ring: it was lost, or no worker has ever started",
        lambda group: group.limbo_ready,
    ),
    Gauge(
        f"{PREFIX}_switch_open", "1 while a switch to another generation is under way", lambda group: bool(group.switch)
    ),
    Gauge(
        f"{PREFIX}_switch_step",
        "Step at which the open switch is; 0: none is open",
        lambda group: 0 if group.switch is None else group.switch.step,
    ),
    Gauge(
        f"{PREFIX}_segments_undrained",
        "Ended segments of the chain that are not drained yet",
        lambda group: sum(segment.ended and not segment.drained for segment in group.segments),
    ),
)

SHARD_GAUGES: tuple[Gauge[ShardStatus], ...] = (
    Gauge(f"{PREFIX}_waiting_messages", "Messages that no worker holds", lambda row: row.ready),
    Gauge(f"{PREFIX}_unacknowledged_messages", "Messages that the owner holds", lambda row: row.unacknowledged),
    Gauge(f"{PREFIX}_running_tasks", "Tasks that run", lambda row: row.running),
    Gauge(
        f"{PREFIX}_lag_seconds",
        "Age of the oldest waiting message, estimated while nobody owns the shard; not shown if unknown",
        lambda row: row.lag_seconds,
    ),
    Gauge(
        f"{PREFIX}_consumers",
        "Workers that consume it: the owner and the standbys",
        lambda row: len(row.standbys) + (row.owner is not None),
    ),
    Gauge(
        f"{PREFIX}_store_waiting_messages",
        "Messages at the heads of their lanes that wait for the claim store",
        lambda row: None if row.owner is None else row.store_waiting,
    ),
    Gauge(
        f"{PREFIX}_store_unreachable_timestamp_seconds",
        "When the claim store stopped answering, in seconds since the epoch; not shown if nothing waits for it",
        lambda row: row.store_away_since,
    ),
    Gauge(
        f"{PREFIX}_claim_waiting_messages",
        "Messages at the heads of their lanes that wait for a claim which another run holds",
        lambda row: None if row.owner is None else row.claim_waiting,
    ),
    Gauge(f"{PREFIX}_paused", "1 if it is paused", lambda row: row.state == "paused"),
    Gauge(
        f"{PREFIX}_owned_timestamp_seconds",
        "When the owner took the shard, in seconds since the epoch; not shown without an owner",
        lambda row: None if row.owner is None else row.since,
    ),
    Gauge(f"{PREFIX}_owner_info", "1; `worker` is the owner", lambda row: row.owner, label="worker"),
    Gauge(
        f"{PREFIX}_state_info",
        "1; `state` is the shard's state, as in `shards status`",
        lambda row: row.state,
        label="state",
    ),
)

COUNTERS = (
    ShardCounter(f"{PREFIX}_received_total", "Messages delivered to an owner, redeliveries included", "delivered"),
    ShardCounter(f"{PREFIX}_done_total", "Messages whose task has ended, failed ones included", "done"),
    ShardCounter(f"{PREFIX}_failed_total", "Tasks that failed for good, those of dead letters included", "failed"),
    ShardCounter(f"{PREFIX}_retried_total", "Retries in place", "retried"),
    ShardCounter(f"{PREFIX}_lost_total", "Runs whose process died", "lost"),
    ShardCounter(f"{PREFIX}_killed_total", "Runs killed on purpose: revoked, or over their time limit", "killed"),
    ShardCounter(f"{PREFIX}_dead_total", "Messages that became dead letters", "dead"),
    ShardCounter(f"{PREFIX}_unburied_total", "Dead letters that cannot be stored; their keys wait", "unburied"),
    ShardCounter(f"{PREFIX}_deduplicated_total", "Runs that found their work done by another", DEDUPLICATED),
    ShardCounter(
        f"{PREFIX}_commits_refused_total", "Runs whose claim had lapsed before they committed", COMMIT_REFUSED
    ),
)

NAMES = (
    *(each[0] for each in (UP, AGE, WAIT, RUN, HANDOVERS)),
    *(each.name for each in GROUP_GAUGES),
    *(each.name for each in SHARD_GAUGES),
    *(each.name for each in COUNTERS),
)
