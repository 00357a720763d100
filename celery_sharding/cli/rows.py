"""The shards of a group as a table: which columns there are, and how each is written for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from celery_sharding.cli.exits import WrongUsage
from celery_sharding.cli.groups import NOT_DECLARED
from celery_sharding.cli.output import align, format_duration, shorten
from celery_sharding.config import suggest
from celery_sharding.layout.protocol import describe_need, is_known
from celery_sharding.monitoring.status import GroupStatus, ShardStatus

# A shorter name of a worker would be useless.
_NAME_MIN = 16


@dataclass(frozen=True, slots=True)
class Column:
    """`show` writes the cell of a row, given the moment of the snapshot."""

    heading: str
    show: Callable[[GroupStatus, ShardStatus, float], str]
    numeric: bool = False


# By the names of the JSON.
COLUMNS = {
    "index": Column("SHARD", lambda group, row, _: group.label(row)),
    "kind": Column("KIND", lambda _, row, __: row.kind),
    "queue": Column("QUEUE", lambda _, row, __: row.queue),
    "state": Column("STATE", lambda _, row, __: row.state),
    "ready": Column("READY", lambda _, row, __: _number(row.ready), numeric=True),
    "held": Column("HELD", lambda _, row, __: _number(row.held), numeric=True),
    "unacknowledged": Column("UNACKED", lambda _, row, __: _number(row.unacknowledged), numeric=True),
    "running": Column("RUNNING", lambda _, row, __: _number(row.running), numeric=True),
    "lag_seconds": Column("LAG", lambda _, row, __: format_lag(row), numeric=True),
    "in_rate": Column("IN/S", lambda _, row, __: format_rate(row.in_rate), numeric=True),
    "out_rate": Column("OUT/S", lambda _, row, __: format_rate(row.out_rate), numeric=True),
    "clear_seconds": Column("CLEAR", lambda _, row, __: _duration(row.clear_seconds), numeric=True),
    "store_waiting": Column("NO STORE", lambda _, row, __: str(row.store_waiting), numeric=True),
    "claim_waiting": Column("NO CLAIM", lambda _, row, __: str(row.claim_waiting), numeric=True),
    "owner": Column("OWNER", lambda _, row, __: row.owner or "-"),
    "standbys": Column("STANDBYS", lambda _, row, __: _standbys(row)),
    "since": Column("SINCE", lambda _, row, now: "-" if row.since is None else format_duration(now - row.since)),
}
DEFAULT_COLUMNS = (
    *("index", "state", "ready", "unacknowledged", "lag_seconds", "in_rate", "out_rate", "clear_seconds"),
    *("owner", "standbys", "since"),
)
_NAMES = ("owner", "standbys")


def read_columns(text: str | None) -> tuple[str, ...]:
    """Return the columns in a comma-separated list; None: the default ones.

    Raises:
        WrongUsage: There is no such column; the message names the nearest.
    """
    if text is None:
        return DEFAULT_COLUMNS
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in COLUMNS:
            raise WrongUsage(f"there is no column {name!r}{suggest(name, COLUMNS)}; there are {', '.join(COLUMNS)}")
    if not names:
        raise WrongUsage(f"--columns is empty; there are {', '.join(COLUMNS)}")
    return names


def describe_group(group: GroupStatus, columns: Iterable[str], *, now: float, width: int | None) -> list[str]:
    """Return the lines that show a group.

    Args:
        now: The moment of the snapshot.
        width: Of the terminal; names of workers are shortened to fit. None: not at all.
    """
    if not group.declared:
        why = NOT_DECLARED if is_known(group.protocol) else describe_need(group.protocol)
        return [f"{group.name}: {why}"]
    lines = [f"{group.name}: {', '.join(_facts(group))}"]
    if not is_known(group.protocol):
        lines.append(f"  {describe_need(group.protocol)}")
    if group.switch is not None:
        lines.append(f"  switch to generation {group.switch.generation} under way, at step {group.switch.step}")
    if group.limbo_ready:
        lines.append(f"  {group.limbo_ready} messages came while there was no ring; a worker makes a new one for them")
    if group.store_away_since is not None:
        waiting = sum(row.store_waiting for row in group.rows)
        lines.append(
            f"  {format_store_away(group.store_away_since, now)}; {waiting} messages wait for it in their lanes"
        )
    if group.rows:
        lines += [f"  {line}" for line in _table(group, tuple(columns), now, None if width is None else width - 2)]
    return lines


def format_lag(row: ShardStatus) -> str:
    if row.lag_seconds is None:
        return "?"
    return f"{'~' if row.lag_estimated else ''}{format_duration(row.lag_seconds)}"


def format_store_away(since: float, now: float) -> str:
    at = datetime.fromtimestamp(since).strftime("%H:%M:%S")
    return f"claim store unreachable since {at} ({format_duration(max(0.0, now - since))})"


def format_rate(rate: float | None) -> str:
    return "?" if rate is None else f"{rate:.1f}" if rate < 99.95 else f"{rate:.0f}"


def _facts(group: GroupStatus) -> list[str]:
    facts = [f"generation {group.generation}", f"{len(group.shards)} shards", f"{group.ready} waiting"]
    facts += ["paused"] if group.paused else []
    worst = group.worst_lag
    if worst is not None and worst.lag_seconds:
        facts.append(f"worst lag {format_lag(worst)}")
    if group.skew is not None and len(group.shards) > 1:
        facts.append(f"skew {group.skew:.1f}")
    for state in ("unowned", "stuck", "missing", *(() if group.paused else ("paused",))):
        count = sum(row.state == state for row in group.rows)
        facts += [f"{count} {state}"] if count else []
    return facts + ([f"{group.dead_letters} dead letters"] if group.dead_letters else [])


def _table(group: GroupStatus, names: tuple[str, ...], now: float, width: int | None) -> list[str]:
    columns = [COLUMNS[name] for name in names]
    rows = [[column.show(group, row, now) for column in columns] for row in group.rows]
    numeric = {number for number, column in enumerate(columns) if column.numeric}
    lines = align([column.heading for column in columns], rows, numeric=numeric)
    excess = 0 if width is None else max(map(len, lines)) - width
    shrinking = [number for number, name in enumerate(names) if name in _NAMES]
    if excess <= 0 or not shrinking:
        return lines
    longest = {number: max(len(row[number]) for row in rows) for number in shrinking}
    budget = sum(longest.values()) - excess
    for number in sorted(shrinking, key=longest.__getitem__):  # a short one leaves room for the others
        share = max(_NAME_MIN, budget // len(shrinking))
        budget -= min(share, longest[number])
        shrinking = shrinking[1:]
        for row in rows:
            row[number] = shorten(row[number], share)
    return align([column.heading for column in columns], rows, numeric=numeric)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)


def _standbys(row: ShardStatus) -> str:
    more = f" +{len(row.standbys) - 1}" if len(row.standbys) > 1 else ""
    return f"{row.standbys[0]}{more}" if row.standbys else "-"
