"""`shards export`: the fixed part of groups, a guarding policy, and permissions, for other tools to declare."""

from __future__ import annotations

from typing import Any

import click

from celery_sharding.cli.exits import WrongUsage, explained
from celery_sharding.cli.groups import check_has_logs, choose_groups, find_sharding
from celery_sharding.config import suggest
from celery_sharding.operations.export import plan_export, to_definitions, to_operator
from celery_sharding.operations.permissions import ROLES, Permissions, Role, celery_names, permissions_for


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

    Rings and queues are not in it: workers make them. Import it, then run `celery shards declare` or start a worker,
    then publish. It may be imported again at any time. Users must exist, or have secrets for the operator; passwords
    are never written. Needs no broker.

    \b
    Examples:
      celery -A shop shards export --format definitions > shards.json
      celery -A shop shards export orders --format definitions --user worker=shop --user publisher=web
      celery -A shop shards export --format operator --cluster rabbit --user operator=oncall | kubectl apply -f -
    """
    with explained():
        sharding = find_sharding(ctx)
        names = [each.name for each in choose_groups(sharding, group)]
        check_has_logs(sharding, needed_by="export")
        allowed = [(name, _permissions(sharding.app, role, names)) for role, name in map(_read_user, users)]
        connection: Any = sharding.connect()
        plan = plan_export(names, virtual_host=connection.virtual_host or "/", users=allowed)
    text = to_definitions(plan) if form == "definitions" else to_operator(plan, cluster=cluster).rstrip()
    ctx.obj.echo(text)


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
