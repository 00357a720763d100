"""`shards list`, `declare` and `export`: the configured groups, and how they are declared on the broker."""

from __future__ import annotations

from typing import Any

import click

from celery_sharding.cli.exits import WrongUsage
from celery_sharding.cli.groups import choose_groups, connected, find_on_rabbitmq, find_sharding, open_backing
from celery_sharding.cli.output import align, emit
from celery_sharding.config import ShardGroup, suggest
from celery_sharding.extension import Sharding
from celery_sharding.layout.ensure import check_queue_type, find_fault
from celery_sharding.layout.manifest import load
from celery_sharding.layout.model import Layout
from celery_sharding.layout.protocol import check_protocol
from celery_sharding.operations.export import plan_export, to_definitions, to_operator
from celery_sharding.operations.permissions import ROLES, Permissions, Role, celery_names, permissions_for
from celery_sharding.rabbitmq.connect import process_name
from celery_sharding.texts import printable
from celery_sharding.topology import Names


@click.command("list")
@click.pass_context
def list_groups(ctx: click.Context) -> None:
    """List the configured groups and the tasks that are routed to them. Needs no broker.

    \b
    Example:
      celery -A shop shards list
    """
    sharding = find_sharding(ctx)
    groups = choose_groups(sharding, None)
    tasks = _find_tasks(sharding)
    doubts = [*sharding.warnings, *sharding.find_idle_routes(sharding.settings.groups)]
    rows = [
        (group.name, str(group.shards), group.ordering, group.queue_type, ", ".join(tasks[group.name]) or "-")
        for group in groups
    ]
    emit(ctx, align(("GROUP", "SHARDS", "ORDERING", "QUEUE TYPE", "TASKS"), rows, numeric={1}))
    for doubt in doubts:
        click.echo(f"warning: {printable(doubt)}", err=True)


@click.command()
@click.argument("group", required=False)
@click.option("--dry-run", is_flag=True, help="Show what would be done, and change nothing.")
@click.pass_context
def declare(ctx: click.Context, group: str | None, dry_run: bool) -> None:
    """Declare GROUP, or all groups, on the broker, as a worker does when it starts. May be repeated.

    \b
    Examples:
      celery -A shop shards declare
      celery -A shop shards declare orders --dry-run
    """
    sharding = find_on_rabbitmq(ctx, "declare --dry-run") if dry_run else find_sharding(ctx)
    chosen = choose_groups(sharding, group)
    if dry_run:
        _print_plan(ctx, sharding, chosen)
        return
    backing = open_backing(sharding)
    for each in chosen:
        before = Layout()
        if backing.has_logs:
            with connected(sharding) as connection:
                before = load(connection, Names(each.name))
        after = backing.ensure(each, owner=f"shards declare, {process_name()}")
        ctx.obj.echo(f"{each.name}: {_describe_change(before, after)}")
        if after.shards != each.shards:
            click.echo(
                f"{each.name}: {after.shards} shards are live, {each.shards} are configured; the live ones count, "
                f"so set shards={after.shards}",
                err=True,
            )


@click.command("export")
@click.argument("group", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["definitions", "operator"]),
    required=True,
    help="RabbitMQ definitions (JSON), or objects for RabbitMQ's topology operator (YAML).",
)
@click.option("--user", "users", metavar="ROLE=NAME", multiple=True, help=f"ROLE is one of {', '.join(ROLES)}.")
@click.option("--cluster", default="rabbitmq", show_default=True, help="The RabbitmqCluster, for the operator.")
@click.pass_context
def export(ctx: click.Context, group: str | None, form: str, users: tuple[str, ...], cluster: str) -> None:
    """Write what other tools may declare of GROUP, or of all groups: three exchanges, a policy, and permissions.

    Rings and queues are left out: workers make them. Import it, then run `celery shards declare` or start a worker,
    then publish. It may be imported again at any time. Users must exist, or have secrets for the operator; passwords
    are never written. Needs no broker.

    \b
    Examples:
      celery -A shop shards export --format definitions > shards.json
      celery -A shop shards export orders --format definitions --user worker=shop --user publisher=web
      celery -A shop shards export --format operator --cluster rabbit --user operator=oncall | kubectl apply -f -
    """
    sharding = find_on_rabbitmq(ctx, "export")
    names = [each.name for each in choose_groups(sharding, group)]
    allowed = [(name, _permissions(sharding.app, role, names)) for role, name in map(_read_user, users)]
    connection: Any = sharding.connect()
    plan = plan_export(names, virtual_host=connection.virtual_host or "/", users=allowed)
    ctx.obj.echo(to_definitions(plan) if form == "definitions" else to_operator(plan, cluster=cluster).rstrip())


def _print_plan(ctx: click.Context, sharding: Sharding, groups: list[ShardGroup]) -> None:
    plans = {}
    with connected(sharding) as connection:
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


def _read_user(text: str) -> tuple[Role, str]:
    role, separator, name = text.partition("=")
    if not separator or not name:
        raise WrongUsage(f"--user takes ROLE=NAME, as in worker=shop, not {text!r}")
    if role not in ROLES:
        raise WrongUsage(f"--user {text!r}: there is no role {role!r}{suggest(role, ROLES)}; {', '.join(ROLES)} are")
    return role, name


def _permissions(app: Any, role: Role, groups: list[str]) -> Permissions:
    conf = app.conf
    queues = app.amqp.queues
    quorum = any((queue.queue_arguments or {}).get("x-queue-type") == "quorum" for queue in queues.values())
    found = celery_names(
        queues=[*queues, *(queue.exchange.name for queue in queues.values() if queue.exchange.name)],
        control_exchange=conf.control_exchange,
        event_exchange=conf.event_exchange,
        event_queue_prefix=conf.event_queue_prefix,
        delays=quorum or conf.task_default_queue_type == "quorum",
    )
    return permissions_for(role, groups, celery_names=found if role == "worker" else ())
