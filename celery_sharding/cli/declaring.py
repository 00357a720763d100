"""`shards list` and `shards declare`: the groups of the configuration, and how they come to the broker."""

from __future__ import annotations

import click

from celery_sharding.cli.exits import explained
from celery_sharding.cli.groups import choose_groups, connected, find_sharding, open_backing
from celery_sharding.cli.tables import align
from celery_sharding.config import ShardGroup
from celery_sharding.extension import Sharding
from celery_sharding.layout.ensure import check_queue_type, find_fault
from celery_sharding.layout.manifest import load
from celery_sharding.layout.model import Layout
from celery_sharding.layout.protocol import check_protocol
from celery_sharding.rabbitmq.connect import process_name
from celery_sharding.texts import printable
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
        doubts = [*sharding.doubts, *sharding.find_idle_routes(sharding.settings.groups)]
    rows = [
        (group.name, str(group.shards), group.ordering, group.queue_type, ", ".join(tasks[group.name]) or "-")
        for group in groups
    ]
    for line in align(("GROUP", "SHARDS", "ORDERING", "QUEUE TYPE", "TASKS"), rows, numeric={1}):
        ctx.obj.echo(line)
    for doubt in doubts:
        click.echo(f"warning: {printable(doubt)}", err=True)


@click.command()
@click.argument("group", required=False)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.pass_context
def declare(ctx: click.Context, group: str | None, dry_run: bool) -> None:
    """Make GROUP, or all groups, ready on the broker, as a worker does when it starts. May be repeated.

    \b
    Examples:
      celery -A shop shards declare
      celery -A shop shards declare orders --dry-run
    """
    with explained():
        sharding = find_sharding(ctx)
        chosen = choose_groups(sharding, group)
        if dry_run:
            _say_what_to_declare(ctx, sharding, chosen)
            return
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


def _say_what_to_declare(ctx: click.Context, sharding: Sharding, groups: list[ShardGroup]) -> None:
    plans = {}
    with connected(sharding, needed_by="declare --dry-run") as connection:
        for group in groups:
            names = Names(group.name)
            layout = load(connection, names)
            check_protocol(group.name, layout.protocol)
            check_queue_type(group, layout)
            fault = find_fault(connection, names, layout)
            plans[group.name] = _describe_plan(group, layout, fault)
    for name, plan in plans.items():
        ctx.obj.echo(f"{name}: {plan}")


def _describe_plan(group: ShardGroup, layout: Layout, fault: str | None) -> str:
    if fault is None:
        return f"in place, generation {layout.generation}, {layout.shards} shards; nothing to do"
    if layout.switch is not None:
        return f"{fault}; it would be carried on, to {layout.shards} shards"
    if not layout.generation:
        return f"{fault}; generation 1 would be declared, {group.shards} shards"
    return f"{fault}; it would be put right, with {layout.shards} shards"


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
