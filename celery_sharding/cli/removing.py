"""`shards gc`, `shards purge` and `shards remove`: delete queues, messages and groups that are no longer needed."""

from __future__ import annotations

import re

import click

from celery_sharding.cli.exits import Unhealthy, ask, ask_name, check_can_ask, yes_option
from celery_sharding.cli.groups import find_on_rabbitmq, operator_name, resolve_group, resolve_groups
from celery_sharding.cli.output import emit
from celery_sharding.config import ShardGroup
from celery_sharding.errors import GroupInUse
from celery_sharding.layout.cleanup import Removal
from celery_sharding.operations.gc import remove_left_behind
from celery_sharding.operations.purge import count_purgeable
from celery_sharding.operations.purge import purge as purge_shards
from celery_sharding.operations.remove_group import check_removable, remove_group
from celery_sharding.topology import Names


@click.command()
@click.argument("group", required=False)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.pass_context
def gc(ctx: click.Context, group: str | None, dry_run: bool) -> None:
    """Remove the queues that GROUP, or all groups, have left behind, and say why others stay.

    Workers do so by themselves, a minute after a segment of the chain is drained. Messages that came too late are moved
    to the live shards first. Nothing that a worker consumes is removed.

    \b
    Examples:
      celery -A shop shards gc --dry-run
      celery -A shop shards gc orders
    """
    sharding = find_on_rabbitmq(ctx, "gc")
    for name in resolve_groups(sharding, group):
        found = remove_left_behind(sharding.connect, name, by=operator_name(), dry_run=dry_run)
        lines = [_describe(each, dry_run=dry_run) for each in found] or ["nothing is left behind"]
        emit(ctx, [f"{name}: {line}" for line in lines])


@click.command()
@click.argument("group")
@click.argument("shard", required=False, type=click.IntRange(min=0), metavar="[N]")
@yes_option
@click.pass_context
def purge(ctx: click.Context, group: str, shard: int | None, yes: bool) -> None:
    """Delete the messages that wait in GROUP, or in shard N of it, for good.

    Messages that a worker holds still run; stop the workers first if they should not. Dead letters stay. The results of
    deleted messages stay PENDING for ever: nobody who waits for one gets it, and chains, groups and chords that contain
    it do not go on.

    Without N, messages in earlier segments of the chain are deleted, too; this is refused while a worker finishes one.
    With N, only those in that shard of the live generation.

    \b
    Examples:
      celery -A shop shards purge orders
      celery -A shop shards purge orders 3 --yes
    """
    sharding = find_on_rabbitmq(ctx, "purge")
    check_can_ask(yes=yes)
    name = resolve_group(sharding, group)
    if not yes:
        waiting = count_purgeable(sharding.connect, name, shard)
        for queue, count in waiting.items():
            if count:
                click.echo(f"  {count:>8}  {_label(name, queue)}", err=True)
        ask(f"Delete about {sum(waiting.values())} messages of {name}?", yes=yes)
    done = purge_shards(sharding.connect, name, shard, by=operator_name())
    for queue, count in done.items():
        if count:
            ctx.obj.echo(f"{name}: {count} messages of {_label(name, queue)} thrown away")
    if not any(done.values()):
        ctx.obj.echo(f"{name}: no messages waited")


@click.command()
@click.argument("group")
@yes_option
@click.pass_context
def remove(ctx: click.Context, group: str, yes: bool) -> None:
    """Delete everything of GROUP from the broker: exchanges, queues and its history.

    GROUP need not be configured any more. Refused while messages or dead letters of it wait, or a worker follows it:
    stop the workers, or start them without it in their configuration or with -X. A worker, publisher or `shards
    declare` with GROUP in its configuration declares it anew.

    \b
    Examples:
      celery -A shop shards remove orders
      celery -A shop shards remove orders --yes
    """
    sharding = find_on_rabbitmq(ctx, "remove")
    check_can_ask(yes=yes)
    ShardGroup(group, shards=1)  # refuses what cannot be a name
    try:
        if not yes:
            click.echo("checking whether it is in use…", err=True)
            check_removable(sharding.connect, group)
            ask_name(group, f"Type {group} to delete everything of it", yes=yes)
        remove_group(sharding.connect, group)
    except GroupInUse as exc:
        lines = [f"group {group!r} is in use; nothing was removed:", *(f"  {line}" for line in exc.obstacles)]
        raise Unhealthy("\n".join(lines)) from exc
    ctx.obj.echo(f"{group}: removed")


def _describe(found: Removal, *, dry_run: bool) -> str:
    if found.kept_because is not None:
        return f"{found.name} stays: {found.kept_because}"
    moved = f"; {found.moved} messages in it run now, perhaps behind later ones of their keys" if found.moved else ""
    return f"{found.name} {'would be removed' if dry_run else 'is removed'}{moved}"


def _label(group: str, queue: str) -> str:
    """Return what people call a queue: shard 3 (g001.003), or limbo001."""
    rest = queue.removeprefix(f"{Names(group).publish}.")
    match = re.fullmatch(r"(g\d+)\.(\d+)", rest)
    return f"shard {int(match[2])} ({rest})" if match else rest
