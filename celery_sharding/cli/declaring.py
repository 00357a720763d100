"""`shards list` and `shards declare`: the groups of the configuration, and how they come to the broker."""

from __future__ import annotations

import click

from celery_sharding.backing import process_name
from celery_sharding.cli.exits import explained
from celery_sharding.cli.groups import choose_groups, connected, find_sharding, open_backing
from celery_sharding.cli.tables import align
from celery_sharding.extension import Sharding
from celery_sharding.layout import Layout
from celery_sharding.manifest import load
from celery_sharding.topology import Names


@click.command("list")
@click.pass_context
def list_groups(ctx: click.Context) -> None:
    """List the groups of the configuration and the tasks that are routed to them. Needs no broker.

    \b
    Example:
      celery -A shop shards list
    """
    with explained():
        sharding = find_sharding(ctx)
        groups = choose_groups(sharding, None)
        tasks = _find_tasks(sharding)
    rows = [
        (group.name, str(group.shards), group.ordering, group.queue_type, ", ".join(tasks[group.name]) or "-")
        for group in groups
    ]
    for line in align(("GROUP", "SHARDS", "ORDERING", "QUEUE TYPE", "TASKS"), rows, numeric={1}):
        ctx.obj.echo(line)


@click.command()
@click.argument("group", required=False)
@click.pass_context
def declare(ctx: click.Context, group: str | None) -> None:
    """Make GROUP, or all groups, ready on the broker, as a worker does when it starts. May be repeated.

    \b
    Examples:
      celery -A shop shards declare
      celery -A shop shards declare orders
    """
    with explained():
        sharding = find_sharding(ctx)
        chosen = choose_groups(sharding, group)
        backing = open_backing(sharding)
        for each in chosen:
            before = Layout()
            if backing.has_logs:
                with connected(sharding, needed_by="declare") as connection:
                    before = load(connection, Names(each.name))
            after = backing.ensure(each, owner=f"shards declare, {process_name()}")
            ctx.obj.echo(f"{each.name}: {_describe_change(before, after)}")
            if after.shards != each.shards:
                click.echo(
                    f"{each.name}: {after.shards} shards are live, {each.shards} are configured; the live ones count, "
                    f"so set shards={after.shards}",
                    err=True,
                )


def _find_tasks(sharding: Sharding) -> dict[str, list[str]]:
    """Return the names of the tasks of each group; patterns that stand for tasks of other processes come last."""
    app = sharding.app
    app.loader.import_default_modules()
    found: dict[str, list[str]] = {name: [] for name in sharding.settings.groups}
    for name in sorted(app.tasks):
        rule = sharding.rules.rule_for(name, app.tasks[name])
        if rule is not None:
            found[rule.group.name].append(name)
    for route in sharding.settings.routes:
        if route.pattern not in found[route.group]:
            found[route.group].append(route.pattern)
    return found


def _describe_change(before: Layout, after: Layout) -> str:
    live = f"generation {after.generation}, {after.shards} shards"
    if before == after:
        return f"in place, {live}"
    if before.generation == after.generation:
        return f"put right, {live}"
    return f"declared, {live}" + (f", in place of generation {before.generation}" if before.generation else "")
