"""`shards pause`, `shards resume` and `shards history`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime

import click

from celery_sharding.cli.exits import Unhealthy, explained
from celery_sharding.cli.groups import (
    NOT_DECLARED,
    check_has_logs,
    choose_groups,
    choose_shard,
    connected,
    find_sharding,
    operator_name,
)
from celery_sharding.cli.tables import align
from celery_sharding.monitoring.history import Entry, read_history, to_json
from celery_sharding.operations import pause as pausing


@click.command()
@click.argument("shard", metavar="GROUP|GROUP/N")
@click.pass_context
def pause(ctx: click.Context, shard: str) -> None:
    """Let nothing more start of a group, or of one shard of it, until it is resumed.

    What runs may end; messages wait in their order. It is in force in every worker within a second, and after any
    restart. Pausing what is paused is no error.

    \b
    Examples:
      celery -A shop shards pause orders
      celery -A shop shards pause orders/3
    """
    _change(ctx, shard, pausing.pause, changed="paused", unchanged="already paused", verb="pause")


@click.command()
@click.argument("shard", metavar="GROUP|GROUP/N")
@click.pass_context
def resume(ctx: click.Context, shard: str) -> None:
    """Let a paused shard go on, or a group with all its shards. Resuming what is not paused is no error.

    \b
    Examples:
      celery -A shop shards resume orders/3
      celery -A shop shards resume orders
    """
    _change(ctx, shard, pausing.resume, changed="resumed", unchanged="not paused", verb="resume")


@click.command()
@click.argument("group", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The latest so many.")
@click.pass_context
def history(ctx: click.Context, group: str | None, as_json: bool, limit: int) -> None:
    """Show what was done to GROUP, or to all groups, by whom, and how it ended; the latest last.

    Exits with 1 if a group was never declared.

    \b
    Examples:
      celery -A shop shards history orders
      celery -A shop shards history orders --limit 5
      celery -A shop shards history --json | jq '.groups[].entries[] | select(.event == "pause")'
    """
    with explained():
        sharding = find_sharding(ctx)
        chosen = [each.name for each in choose_groups(sharding, group)]
        with connected(sharding, needed_by="history") as connection:
            found = {name: read_history(connection, name, limit) for name in chosen}
    if as_json:
        ctx.obj.echo(json.dumps({"schema": 1, "groups": [to_json(name, entries) for name, entries in found.items()]}))
    else:
        for number, (name, entries) in enumerate(found.items()):
            for line in ([""] if number else []) + _describe(name, entries):
                ctx.obj.echo(line)
    missing = [name for name, entries in found.items() if not entries]
    if missing:
        if as_json:
            click.echo(f"{', '.join(missing)}: {NOT_DECLARED}", err=True)
        ctx.exit(Unhealthy.exit_code)


def _change(
    ctx: click.Context, text: str, change: Callable[..., bool], *, changed: str, unchanged: str, verb: str
) -> None:
    with explained():
        sharding = find_sharding(ctx)
        group, index = choose_shard(sharding, text)
        check_has_logs(sharding, needed_by=verb)
        done = change(sharding.connect, group, index, by=operator_name())
    place = group.name if index is None else f"{group.name}/{index}"
    ctx.obj.echo(f"{place}: {changed if done else unchanged}")


def _describe(name: str, entries: list[Entry]) -> list[str]:
    """Return the lines that show a group's history."""
    if not entries:
        return [f"{name}: {NOT_DECLARED}"]
    rows = [(_moment(entry.at), entry.by, entry.what, entry.result) for entry in entries]
    return [f"{name}:", *(f"  {line}" for line in align(("WHEN", "WHO", "WHAT", "RESULT"), rows, numeric=set()))]


def _moment(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
