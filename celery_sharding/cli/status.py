"""`shards status`: what `admin.snapshot` knows of the groups, as a table or as JSON."""

from __future__ import annotations

import json
from datetime import datetime

import click

from celery_sharding.admin.snapshot import GroupStatus, ShardStatus, read_snapshot, to_json
from celery_sharding.cli.exits import Unhealthy, explained
from celery_sharding.cli.groups import NOT_DECLARED, choose_groups, connected, find_sharding
from celery_sharding.cli.tables import align
from celery_sharding.topology import Names

_HEADINGS = ("SHARD", "STATE", "READY", "HELD", "RUNNING", "LAG S", "OWNER", "STANDBYS", "SINCE", "QUEUE")


@click.command()
@click.argument("group", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def status(ctx: click.Context, group: str | None, as_json: bool) -> None:
    """Show every shard of GROUP, or of all groups: who owns it, what waits, and for how long.

    A lag with "~" is estimated from the last that was known, because the shard has no owner; "?" is not known. Exits
    with 1 if a group was never declared.

    \b
    Examples:
      celery -A shop shards status
      celery -A shop shards status orders
      celery -A shop shards status --json | jq '.groups[].shards[] | select(.state == "unowned")'
    """
    with explained():
        sharding = find_sharding(ctx)
        chosen = choose_groups(sharding, group)
        with connected(sharding, needed_by="status") as connection:
            snapshot = read_snapshot(connection, [each.name for each in chosen])
    if as_json:
        ctx.obj.echo(json.dumps(to_json(snapshot)))
    else:
        for number, each in enumerate(snapshot.groups):
            for line in ([""] if number else []) + _describe(each):
                ctx.obj.echo(line)
    missing = [each.name for each in snapshot.groups if not each.declared]
    if missing:
        if as_json:
            click.echo(f"{', '.join(missing)}: {NOT_DECLARED}", err=True)
        ctx.exit(Unhealthy.exit_code)


def _describe(group: GroupStatus) -> list[str]:
    """Return the lines that show a group."""
    if not group.declared:
        return [f"{group.name}: {NOT_DECLARED}"]
    facts = [f"generation {group.generation}", f"{len(group.shards)} shards", f"{group.ready} waiting"]
    worst = group.worst_lag
    if worst is not None and worst.lag_seconds:
        facts.append(f"worst lag {_lag(worst)} s")
    for state in ("unowned", "stuck"):
        count = sum(row.state == state for row in group.rows)
        facts += [f"{count} {state}"] if count else []
    facts += [f"{group.dead_letters} dead letters"] if group.dead_letters else []
    lines = [f"{group.name}: {', '.join(facts)}"]
    if group.switch is not None:
        lines.append(f"  switch to generation {group.switch.generation} under way, at step {group.switch.step}")
    if group.limbo_ready:
        lines.append(f"  {group.limbo_ready} messages came without a ring; a worker makes a new one for them")
    if group.rows:
        prefix = len(Names(group.name).publish) + 1
        rows = [_row(row, str(row.index) if row.kind == "live" else row.queue[prefix:]) for row in group.rows]
        lines += [f"  {line}" for line in align(_HEADINGS, rows, numeric={2, 3, 4, 5})]
    return lines


def _row(row: ShardStatus, label: str) -> tuple[str, ...]:
    def number(value: int | None) -> str:
        return "-" if value is None else str(value)

    since = "-" if row.since is None else datetime.fromtimestamp(row.since).strftime("%Y-%m-%d %H:%M:%S")
    more = f" +{len(row.standbys) - 1}" if len(row.standbys) > 1 else ""
    standbys = f"{row.standbys[0]}{more}" if row.standbys else "-"
    return (
        label,
        row.state,
        number(row.ready),
        number(row.held),
        number(row.running),
        _lag(row),
        row.owner or "-",
        standbys,
        since,
        row.queue,
    )


def _lag(row: ShardStatus) -> str:
    if row.lag_seconds is None:
        return "?"
    return f"{'~' if row.lag_estimated else ''}{row.lag_seconds:.1f}"
