"""What is wrong with a group, one line for each problem: for `status --check` and other alarms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from celery_sharding.layout.protocol import describe_need, is_known
from celery_sharding.monitoring.status import GroupStatus, ShardStatus, Snapshot

# A step of a switch takes milliseconds, and if the process that began it dies, any worker carries it on.
SWITCH_SECONDS = 60.0
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Health:
    """`problems` need action; `warnings` are worth a look."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def check_health(snapshot: Snapshot, *, max_lag_seconds: float | None = None) -> Health:
    """Return what is wrong in a snapshot. A paused shard is no problem, whatever waits in it.

    Args:
        max_lag_seconds: A larger lag is a problem; None: no lag is.
    """
    problems = [line for group in snapshot.groups for line in _problems(group, snapshot.taken_at, max_lag_seconds)]
    warnings = [line for group in snapshot.groups for line in _warnings(group)]
    return Health(tuple(problems), tuple(warnings))


def _problems(group: GroupStatus, now: float, max_lag_seconds: float | None) -> Iterator[str]:
    if not is_known(group.protocol):
        yield f"{group.name}: {describe_need(group.protocol)}"
    if not group.declared:
        yield f"{group.name}: not declared"
        return
    wanted = [row for row in group.rows if row.state not in ("paused", "waiting")]
    if wanted and not any(row.owner or row.standbys for row in wanted):
        yield f"{group.name}: no worker consumes it"
    else:
        yield from _name(
            group, "unowned, with work", [r for r in wanted if r.state == "unowned" and r.lag_seconds != 0]
        )
    for state in ("stuck", "missing"):
        yield from _name(group, state, [row for row in wanted if row.state == state])
    if group.store_away_since is not None:
        away = [row for row in group.rows if row.store_away_since is not None]
        waiting = sum(row.store_waiting for row in away)
        what = f"claim store unreachable for {now - group.store_away_since:.0f} s, {waiting} messages wait for it"
        yield from _name(group, what, away)
    if max_lag_seconds is not None:
        late = [row for row in wanted if (row.lag_seconds or 0.0) > max_lag_seconds]
        yield from _name(group, f"lag above {max_lag_seconds:g} s", late)
    switch = group.switch
    if switch is not None and switch.at is not None and now - switch.at > SWITCH_SECONDS:
        yield (
            f"{group.name}: the switch to generation {switch.generation} has been at step {switch.step} "
            f"for {now - switch.at:.0f} s; start a worker or run `celery shards declare` to carry it on"
        )


def _warnings(group: GroupStatus) -> Iterator[str]:
    yield from _name(group, "no standby", [row for row in group.shards if row.state == "no standby"])
    if group.generation and group.limbo_ready:
        yield f"{group.name}: {group.limbo_ready} messages came without a ring; a worker makes a new one for them"


def _name(group: GroupStatus, what: str, rows: list[ShardStatus]) -> Iterator[str]:
    if rows:
        yield f"{group.name}: {what}: {name_some([group.label(row) for row in rows])}"


def name_some(names: Sequence[str]) -> str:
    """Return the first few of `names`, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
