"""`shards gc`, `shards purge`, `shards remove`: what is not needed any more goes."""

from __future__ import annotations

import re

import click

from celery_sharding.cli.asking import ask, ask_name, check_can_ask
from celery_sharding.cli.exits import Unhealthy, explained
from celery_sharding.cli.groups import check_has_logs, choose_groups, find_sharding, name_group, operator_name
from celery_sharding.config import ShardGroup
from celery_sharding.errors import GroupInUse
from celery_sharding.layout.cleanup import Removal
from celery_sharding.operations.gc import collect
from celery_sharding.operations.purge import count_purgeable
from celery_sharding.operations.purge import purge as purge_shards
from celery_sharding.operations.remove_group import check_removable, remove_group
from celery_sharding.topology import Names


@click.command()
@click.argument("group", required=False)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.pass_context
def gc(ctx: click.Context, group: str | None, dry_run: bool) -> None:
    """Remove the queues that GROUP, or all groups, have left behind, and say why others stay.

    Workers do so by themselves, a minute after a segment of the chain is drained. What came to a queue too late is
    moved to the live shards first. Nothing that a worker consumes is removed.

    \b
    Examples:
      celery -A shop shards gc --dry-run
      celery -A shop shards gc orders
    """
    with explained():
        sharding = find_sharding(ctx)
        check_has_logs(sharding, needed_by="gc")
        names = (
            [each.name for each in choose_groups(sharding, None)] if group is None else [name_group(sharding, group)]
        )
        for name in names:
            found = collect(sharding.connect, name, by=operator_name(), dry_run=dry_run)
            for line in [_describe(each, dry_run=dry_run) for each in found] or ["nothing is left behind"]:
                ctx.obj.echo(f"{name}: {line}")


@click.command()
@click.argument("group")
@click.argument("shard", required=False, type=click.IntRange(min=0), metavar="[N]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def purge(ctx: click.Context, group: str, shard: int | None, yes: bool) -> None:
    """Throw away what waits in GROUP, or in shard N of it, for good.

    What a worker holds already runs; stop the workers first if it shall not. Dead letters stay, too. The results of
    what is thrown away stay PENDING for ever: whoever waits for one waits in vain, and chains, groups and chords that
    it is part of do not go on.

    Without N, what waits in earlier segments of the chain goes, too; while a worker finishes one, that is refused. With
    N it is only what waits in that shard of the live generation.

    \b
    Examples:
      celery -A shop shards purge orders
      celery -A shop shards purge orders 3 --yes
    """
    with explained():
        sharding = find_sharding(ctx)
        check_has_logs(sharding, needed_by="purge")
        check_can_ask(yes=yes)
        name = name_group(sharding, group)
        if not yes:
            waiting = count_purgeable(sharding.connect, name, shard)
            for queue, count in waiting.items():
                if count:
                    click.echo(f"  {count:>8}  {_label(name, queue)}", err=True)
            ask(f"Throw about {sum(waiting.values())} messages of {name} away?", yes=yes)
        done = purge_shards(sharding.connect, name, shard, by=operator_name())
    for queue, count in done.items():
        if count:
            ctx.obj.echo(f"{name}: {count} messages of {_label(name, queue)} thrown away")
    if not any(done.values()):
        ctx.obj.echo(f"{name}: nothing waited")


@click.command()
@click.argument("group")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def remove(ctx: click.Context, group: str, yes: bool) -> None:
    """Delete everything of GROUP from the broker: exchanges, queues, its history.

    GROUP need not be in the configuration any more. Refused while anything of it waits, dead letters included, or a
    worker follows it: stop the workers, or start them without it in their configuration or with -X. A worker, publisher
    or `shards declare` that has it in its configuration makes it anew.

    \b
    Examples:
      celery -A shop shards remove orders
      celery -A shop shards remove orders --yes
    """
    with explained():
        sharding = find_sharding(ctx)
        check_has_logs(sharding, needed_by="remove")
        check_can_ask(yes=yes)
        ShardGroup(group, shards=1)  # refuses what cannot be a name
        try:
            if not yes:
                click.echo("looking whether anything of it is in use…", err=True)
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
    moved = f"; {found.moved} messages in it run now, maybe behind later ones of their keys" if found.moved else ""
    return f"{found.name} {'would be removed' if dry_run else 'is removed'}{moved}"


def _label(group: str, queue: str) -> str:
    """Return how people call a queue: shard 3 of g001, or limbo001."""
    rest = queue.removeprefix(f"{Names(group).publish}.")
    match = re.fullmatch(r"(g\d+)\.(\d+)", rest)
    return f"shard {int(match[2])} ({rest})" if match else rest
