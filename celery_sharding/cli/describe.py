"""`shards describe`: everything that is known of one shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage
from celery_sharding.cli.groups import NOT_DECLARED, choose_shard, connected, find_on_rabbitmq
from celery_sharding.cli.output import emit, format_duration, format_time, json_option
from celery_sharding.cli.rows import format_lag, format_rate, format_store_away
from celery_sharding.errors import ManagementUnavailable
from celery_sharding.extension import Sharding
from celery_sharding.monitoring.management import ConsumerFacts, Management, QueueFacts, open_management
from celery_sharding.monitoring.shard_events import ShardEvents, read_shard_events
from celery_sharding.monitoring.shard_state import STATES
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.snapshot_json import to_json
from celery_sharding.monitoring.status import GroupStatus, ShardStatus, Snapshot
from celery_sharding.shard_names import check_shard
from celery_sharding.texts import printable
from celery_sharding.timestamps import format_moment
from celery_sharding.topology import Names

_WITHOUT_MANAGEMENT = (
    "without sharding_management_url the broker's count of unacknowledged messages, where consumers come from, the "
    "nodes of the queue and its memory are not known"
)
_STATISTICS_OFF = "statistics are off on the broker: its consumers and memory are not known"
_LABEL_WIDTH = 12


@dataclass(frozen=True, slots=True)
class _Description:
    """All that is known of one shard. `consumers` is None if they are not known."""

    snapshot: Snapshot
    row: ShardStatus
    recent: ShardEvents
    consumers: tuple[ConsumerFacts, ...] | None

    @property
    def group(self) -> GroupStatus:
        return self.snapshot.groups[0]


@click.command()
@click.argument("shard")
@json_option
@click.pass_context
def describe(ctx: click.Context, shard: str, as_json: bool) -> None:
    """Show all that is known of one shard, GROUP/N or GROUP.00N: its state and what to do about it, its owner, its
    counters, and the last handovers, failures and dead letters in the journal.

    With the setting sharding_management_url it also shows what only the broker's management API knows: where each
    consumer comes from, and on which nodes the queue is.

    \b
    Examples:
      celery -A shop shards describe orders/3
      celery -A shop shards describe orders.003 --json | jq .recent.failures
    """
    sharding = find_on_rabbitmq(ctx, "describe")
    group, index = _choose(sharding, shard)
    with connected(sharding) as connection:
        management = open_management(sharding.settings, connection)
        snapshot = read_snapshot(connection, [group], management=management)
        status = snapshot.groups[0]
        if not status.declared:
            raise Unhealthy(f"{group}: {NOT_DECLARED}")
        if not status.shards:
            raise Unhealthy(f"{group}: no generation yet; start a worker, or run `celery shards declare`")
        check_shard(group, index, len(status.shards))
        row, consumers, missing = _ask_broker(management, status.shards[index], snapshot.management_error)
        recent = read_shard_events(connection, Names(group), row.queue)
    found = _Description(snapshot, row, recent, consumers)
    emit(ctx, _to_json(found) if as_json else map(printable, _lines(found)))
    if missing:
        click.echo(missing, err=True)


def _choose(sharding: Sharding, text: str) -> tuple[str, int]:
    group, index = choose_shard(sharding, text)
    if index is None:
        raise WrongUsage(
            f"{text!r} is a whole group; name a shard of it, as {group.name}/0, or use `status {group.name}`"
        )
    return group.name, index


def _ask_broker(
    management: Management | None, row: ShardStatus, error: str
) -> tuple[ShardStatus, tuple[ConsumerFacts, ...] | None, str]:
    """Return the row with the facts of the management API, the consumers, and what could not be learned, in words."""
    if management is None:
        return row, None, _WITHOUT_MANAGEMENT
    if error:
        return row, None, error
    try:
        facts, consumers = management.read_queue(row.queue)
    except ManagementUnavailable as exc:
        return row, None, str(exc)
    known = row.broker or QueueFacts()
    row = replace(row, broker=replace(facts, unacknowledged=known.unacknowledged))
    return row, consumers, _STATISTICS_OFF if consumers is None else ""


def _lines(found: _Description) -> list[str]:
    row, group, now = found.row, found.group, found.snapshot.taken_at
    meaning, advice = STATES[row.state]
    facts = [
        ("queue", row.queue),
        ("generation", f"{group.generation}, shard {row.index} of {len(group.shards)}"),
        ("state", f"{row.state}: {meaning}"),
        ("do", advice),
        ("owner", _owner(row, now)),
        ("standbys", ", ".join(row.standbys) or "none"),
        ("waiting", _waiting(row)),
        ("claims", _claims(row, now)),
        ("lag", f"{format_lag(row)}{' (estimated)' if row.lag_estimated else ''}"),
        ("rates", _rates(row)),
        ("counted", ", ".join(f"{count} {name}" for name, count in sorted(row.counters.items()))),
        *(_broker(row.broker) if row.broker is not None else ()),
    ]
    lines = [f"{group.name}/{row.index}"]
    lines += [f"  {name:<{_LABEL_WIDTH}}{text}" for name, text in facts if text]
    if found.consumers is not None:
        lines += ["  consumers"] + [f"    {_consumer(each)}" for each in found.consumers]
    since = "" if found.recent.since is None else f" of the last {format_duration(now - found.recent.since)}"
    for name, events in found.recent.by_kind.items():
        lines.append(f"  {name.replace('_', ' ')}{since}" + ("" if events else ": none"))
        lines += [f"    {format_time(event['at'])}  {_event(event)}" for event in events]
    return lines


def _owner(row: ShardStatus, now: float) -> str:
    if row.since is None:
        return "none; no earlier one is known"
    age, at = format_duration(now - row.since), format_time(row.since)
    if row.owner is None:
        return f"none; the last one reported {age} ago, at {at}"
    return f"{row.owner} for {age}, since {at}"


def _waiting(row: ShardStatus) -> str:
    if row.ready is None:
        return "not known"
    held = "" if row.held is None else f", {row.held} held by the owner, {row.running} of them running"
    return f"{row.ready} ready{held}"


def _claims(row: ShardStatus, now: float) -> str:
    away = [] if row.store_away_since is None else [format_store_away(row.store_away_since, now)]
    away += [f"{row.store_waiting} messages wait for it"] if row.store_waiting else []
    return "; ".join(away + ([f"{row.claim_waiting} wait for a claim of another run"] if row.claim_waiting else []))


def _rates(row: ShardStatus) -> str:
    clear = "" if row.clear_seconds is None else f"; clear in {format_duration(row.clear_seconds)}"
    return f"{format_rate(row.in_rate)} in, {format_rate(row.out_rate)} out a second{clear}"


def _broker(facts: QueueFacts) -> list[tuple[str, str]]:
    down = sorted(set(facts.members) - set(facts.online))
    return [
        ("unacked", "" if facts.unacknowledged is None else f"{facts.unacknowledged}, by the broker's count"),
        ("leader", facts.leader or "none"),
        ("members", ", ".join(facts.members) + (f"; down: {', '.join(down)}" if down else "")),
        ("memory", "" if facts.memory_bytes is None else f"{facts.memory_bytes / 1e6:.1f} MB"),
    ]


def _consumer(consumer: ConsumerFacts) -> str:
    role = "active" if consumer.active else "standby"
    return (
        f"{role:<8}{consumer.worker}  from {consumer.client or 'a channel that has gone'}  channel {consumer.channel}"
    )


def _event(event: Mapping[str, Any]) -> str:
    if event["event"] == "handover":
        to = f" to {event['to']}" if event.get("to") else ""
        return f"{event.get('change')} by {event.get('owner')}{to}"
    what = f"{event.get('task')}[{event.get('task_id')}]"
    return f"{what}  {event.get('error') or event.get('reason')}"


def _to_json(found: _Description) -> dict[str, Any]:
    row, recent = found.row, found.recent
    meaning, advice = STATES[row.state]
    # One row of `status --json`, in the same shape.
    group = replace(found.group, shards=(row,), earlier=())
    shown = to_json(replace(found.snapshot, groups=(group,)))
    return {
        "schema": shown["schema"],
        "at": shown["at"],
        "group": group.name,
        "generation": group.generation,
        **shown["groups"][0]["shards"][0],
        "meaning": meaning,
        "advice": advice,
        "consumers": None if found.consumers is None else [asdict(each) for each in found.consumers],
        "recent": {
            "since": None if recent.since is None else format_moment(recent.since),
            **{
                kind: [{**each, "at": format_moment(each["at"])} for each in events]
                for kind, events in recent.by_kind.items()
            },
        },
    }
