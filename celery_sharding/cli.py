"""`celery -A app shards …`: look at the groups of an app, and declare them.

Only parses, calls, and prints: what is shown comes from `admin.snapshot`. Results go to stdout, JSON alone; messages go
to stderr. Exit codes: 0 ok, 1 something is wrong with a group, 2 usage or configuration, 69 the broker is out of reach.
Broker passwords are never printed.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import click
from amqp import exceptions as amqp_errors
from kombu.exceptions import OperationalError

from celery_sharding.admin.snapshot import GroupStatus, ShardStatus, read_snapshot, to_json
from celery_sharding.backing import Backing, process_name
from celery_sharding.cli_dedup import dedup
from celery_sharding.cli_exits import Unhealthy, WrongUsage, explained
from celery_sharding.config import ShardGroup
from celery_sharding.connecting import close_connection, open_connection
from celery_sharding.errors import BrokerUnavailable, UnsupportedBroker
from celery_sharding.extension import Sharding
from celery_sharding.layout import Layout
from celery_sharding.manifest import load
from celery_sharding.topology import Names

_NO_SHARDING = """this app has no shard groups. Name the right app with `celery -A`, or add these two lines to it:

    from celery_sharding import Sharding, ShardGroup
    Sharding(app, groups=[ShardGroup("orders", shards=8)])"""
_NOT_DECLARED = "not declared; run `celery shards declare` or start a worker"
_HEADINGS = ("SHARD", "STATE", "READY", "HELD", "RUNNING", "LAG S", "OWNER", "STANDBYS", "SINCE", "QUEUE")


@click.group()
def shards() -> None:
    """Look at shard groups, and declare them.

    \b
    Examples:
      celery -A shop shards status
      celery -A shop shards status orders --json
      celery -A shop shards declare

    Exits with 0 if all is well, 1 if something is wrong with a group or a claim, 2 for wrong usage or configuration,
    and 69 if the broker, or the store of claims, is out of reach.
    """
    # py-amqp warns of deliveries that cross the closing of a channel; nothing is the matter with them.
    logging.getLogger("amqp").setLevel(logging.ERROR)


shards.add_command(dedup)


@shards.command("list")
@click.pass_context
def list_groups(ctx: click.Context) -> None:
    """List the groups of the configuration and the tasks that are routed to them. Needs no broker.

    \b
    Example:
      celery -A shop shards list
    """
    with explained():
        sharding = _sharding(ctx)
        groups = _chosen(sharding, None)
        tasks = _find_tasks(sharding)
    rows = [
        (group.name, str(group.shards), group.ordering, group.queue_type, ", ".join(tasks[group.name]) or "-")
        for group in groups
    ]
    for line in _align(("GROUP", "SHARDS", "ORDERING", "QUEUE TYPE", "TASKS"), rows, numeric={1}):
        ctx.obj.echo(line)


@shards.command()
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
        sharding = _sharding(ctx)
        chosen = _chosen(sharding, group)
        with _connected(sharding, needed_by="status") as connection:
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
            click.echo(f"{', '.join(missing)}: {_NOT_DECLARED}", err=True)
        ctx.exit(Unhealthy.exit_code)


@shards.command()
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
        sharding = _sharding(ctx)
        chosen = _chosen(sharding, group)
        backing = _open_backing(sharding)
        for each in chosen:
            before = Layout()
            if backing.has_logs:
                with _connected(sharding, needed_by="declare") as connection:
                    before = load(connection, Names(each.name))
            after = backing.ensure(each, owner=f"shards declare, {process_name()}")
            ctx.obj.echo(f"{each.name}: {_describe_change(before, after)}")
            if after.shards != each.shards:
                click.echo(
                    f"{each.name}: {after.shards} shards are live, {each.shards} are configured; the live ones count, "
                    f"so set shards={after.shards}",
                    err=True,
                )


def _sharding(ctx: click.Context) -> Sharding:
    sharding = getattr(ctx.obj.app, "sharding", None)
    if not isinstance(sharding, Sharding):
        raise WrongUsage(_NO_SHARDING)
    return sharding


def _chosen(sharding: Sharding, name: str | None) -> list[ShardGroup]:
    settings = sharding.settings
    if name is not None:
        return [settings.group(name, needed_by="the command line")]
    if not settings.groups:
        raise WrongUsage("no shard group is configured; give Sharding(app, groups=[…]) one")
    return [settings.groups[each] for each in sorted(settings.groups)]


def _open_backing(sharding: Sharding) -> Backing:
    try:
        return sharding.backing()
    except ValueError:
        # The text of this error may hold a part of the password.
        raise WrongUsage(
            "the broker's URL cannot be read; percent-encode what is special in its user and password, '/' as %2F"
        ) from None
    except KeyError as exc:
        raise WrongUsage(f"the broker's URL cannot be used: {exc}") from exc


@contextlib.contextmanager
def _connected(sharding: Sharding, *, needed_by: str) -> Iterator[Any]:
    """Yield an open connection of kombu's.

    Raises:
        BrokerUnavailable: There is none, or it was lost.
        UnsupportedBroker: The broker keeps no logs.
    """
    if not _open_backing(sharding).has_logs:
        raise UnsupportedBroker(f"`shards {needed_by}` needs RabbitMQ; this app's broker lives in its own processes")
    connection: Any = sharding.connect()
    try:
        yield open_connection(connection)
    except (OperationalError, amqp_errors.ConnectionError, amqp_errors.AccessRefused, OSError) as exc:
        raise BrokerUnavailable(
            f"the broker {connection.as_uri()} could not be reached ({exc}); check its URL, and that it is up"
        ) from exc
    finally:
        close_connection(connection)


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


def _describe(group: GroupStatus) -> list[str]:
    """Return the lines that show a group."""
    if not group.declared:
        return [f"{group.name}: {_NOT_DECLARED}"]
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
        lines += [f"  {line}" for line in _align(_HEADINGS, rows, numeric={2, 3, 4, 5})]
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


def _align(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: set[int]) -> list[str]:
    """Return the lines of a table; the columns in `numeric` stand to the right."""
    widths = [max(len(line[column]) for line in (headings, *rows)) for column in range(len(headings))]

    def place(column: int, text: str) -> str:
        fit: Callable[[int], str] = text.rjust if column in numeric else text.ljust
        return fit(widths[column])

    return ["  ".join(place(column, text) for column, text in enumerate(line)).rstrip() for line in (headings, *rows)]
