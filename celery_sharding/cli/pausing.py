"""`shards pause`, `shards resume` and `shards history`."""

from __future__ import annotations

import click

from celery_sharding.cli.exits import Unhealthy
from celery_sharding.cli.groups import (
    NOT_DECLARED,
    choose_groups,
    choose_shard,
    connected,
    find_on_rabbitmq,
    operator_name,
)
from celery_sharding.cli.output import align, emit, format_time, json_option
from celery_sharding.config import ShardGroup
from celery_sharding.extension import Sharding
from celery_sharding.monitoring.history import Entry, read_history, to_json
from celery_sharding.operations.pause import pause as pause_shards
from celery_sharding.operations.pause import resume as resume_shards


@click.command()
@click.argument("shard", metavar="GROUP|GROUP/N")
@click.pass_context
def pause(ctx: click.Context, shard: str) -> None:
    """Start no more tasks of a group, or of one shard of it, until it is resumed.

    Running tasks may end; messages wait in order. Every worker obeys within a second, and after any restart. Pausing
    what is paused already is no error.

    \b
    Examples:
      celery -A shop shards pause orders
      celery -A shop shards pause orders/3
    """
    sharding, group, index = _choose(ctx, shard, verb="pause")
    done = pause_shards(sharding.connect, group, index, by=operator_name())
    ctx.obj.echo(f"{_label(group, index)}: {'paused' if done else 'already paused'}")


@click.command()
@click.argument("shard", metavar="GROUP|GROUP/N")
@click.pass_context
def resume(ctx: click.Context, shard: str) -> None:
    """Resume a paused shard, or a group with all its shards. Resuming what is not paused is no error.

    \b
    Examples:
      celery -A shop shards resume orders/3
      celery -A shop shards resume orders
    """
    sharding, group, index = _choose(ctx, shard, verb="resume")
    done = resume_shards(sharding.connect, group, index, by=operator_name())
    ctx.obj.echo(f"{_label(group, index)}: {'resumed' if done else 'not paused'}")


@click.command()
@click.argument("group", required=False)
@json_option
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Show at most this many, the latest."
)
@click.pass_context
def history(ctx: click.Context, group: str | None, as_json: bool, limit: int) -> None:
    """Show what was done to GROUP, or to all groups, who did it, and how it ended; the latest comes last.

    Exits with 1 if a group was never declared.

    \b
    Examples:
      celery -A shop shards history orders
      celery -A shop shards history orders --limit 5
      celery -A shop shards history --json | jq '.groups[].entries[] | select(.event == "pause")'
    """
    sharding = find_on_rabbitmq(ctx, "history")
    chosen = [each.name for each in choose_groups(sharding, group)]
    with connected(sharding) as connection:
        found = {name: read_history(connection, name, limit) for name in chosen}
    if as_json:
        emit(ctx, {"schema": 1, "groups": [to_json(name, entries) for name, entries in found.items()]})
    else:
        for number, (name, entries) in enumerate(found.items()):
            emit(ctx, ([""] if number else []) + _describe(name, entries))
    missing = [name for name, entries in found.items() if not entries]
    if missing:
        if as_json:
            click.echo(f"{', '.join(missing)}: {NOT_DECLARED}", err=True)
        ctx.exit(Unhealthy.exit_code)


def _choose(ctx: click.Context, text: str, *, verb: str) -> tuple[Sharding, ShardGroup, int | None]:
    sharding = find_on_rabbitmq(ctx, verb)
    return sharding, *choose_shard(sharding, text)


def _label(group: ShardGroup, index: int | None) -> str:
    return group.name if index is None else f"{group.name}/{index}"


def _describe(name: str, entries: list[Entry]) -> list[str]:
    if not entries:
        return [f"{name}: {NOT_DECLARED}"]
    rows = [(format_time(entry.at), entry.by, entry.what, entry.result) for entry in entries]
    return [f"{name}:", *(f"  {line}" for line in align(("WHEN", "WHO", "WHAT", "RESULT"), rows, numeric=set()))]
