"""`shards locate`: which shard takes a key, and who owns that."""

from __future__ import annotations

from typing import Any

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage
from celery_sharding.cli.groups import NOT_DECLARED, choose_groups, connected, find_on_rabbitmq
from celery_sharding.cli.output import align, emit, json_option
from celery_sharding.errors import ShardKeyError
from celery_sharding.keys import key_text
from celery_sharding.layout.manifest import load
from celery_sharding.layout.model import Layout
from celery_sharding.layout.protocol import check_protocol
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.status import ShardStatus
from celery_sharding.operations.locate import Located, Place, locate_keys
from celery_sharding.topology import Names

_HEADINGS = ("KEY", "SHARD", "GENERATION", "OWNER", "STATE", "QUEUE")


@click.command()
@click.argument("group")
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@json_option
@click.pass_context
def locate(ctx: click.Context, group: str, keys: tuple[str, ...], as_json: bool) -> None:
    """Show which shard of GROUP takes each KEY, and who owns it. Asks the broker, and leaves nothing there.

    During a switch to another generation, a key has a place in both: earlier messages are in the older one.

    \b
    Examples:
      celery -A shop shards locate orders 42
      celery -A shop shards locate orders 42 43 --json | jq '.keys[].places[-1].owner'
    """
    sharding = find_on_rabbitmq(ctx, "locate")
    (chosen,) = choose_groups(sharding, group)
    texts = [_check_key(key) for key in keys]
    names = Names(chosen.name)
    with connected(sharding) as connection:
        layout = load(connection, names)
        check_protocol(chosen.name, layout.protocol)  # an unknown layout may place keys elsewhere
        if not layout.generation:
            raise Unhealthy(_describe_missing(names, layout))
        located = locate_keys(connection, names, layout, texts)
        (status,) = read_snapshot(connection, [chosen.name]).groups
    rows = {row.queue: row for row in status.rows}
    if as_json:
        emit(ctx, {"schema": 1, "group": chosen.name, "keys": [_to_json(each, rows) for each in located]})
    else:
        table = [_row(each.key, place, rows.get(place.queue)) for each in located for place in each.places]
        emit(ctx, align(_HEADINGS, table, numeric={1, 2}))
    for line in _describe_switch(names, layout, located[0]):
        click.echo(line, err=True)


def _check_key(key: str) -> str:
    try:
        return key_text(key, task="locate")
    except ShardKeyError as exc:
        raise WrongUsage(exc.message.removeprefix("task 'locate': ")) from exc


def _describe_missing(names: Names, layout: Layout) -> str:
    if not layout.limbo:
        return f"{names.group}: {NOT_DECLARED}"
    return (
        f"{names.group} has no shards yet; what is published waits in {names.limbo(layout.limbo)} until a worker starts"
    )


def _describe_switch(names: Names, layout: Layout, located: Located) -> list[str]:
    lines = []
    if layout.switch is not None:
        lines.append(f"{names.group}: a switch to generation {layout.generation} is under way")
    if located.waits_in is not None:
        lines.append(f"{names.group}: what is published now waits in {located.waits_in}, whatever its key")
    elif len(located.places) > 1:
        lines.append(
            f"{names.group}: generation {located.takes} takes what is published now; others are not drained yet"
        )
    return lines


def _row(key: str, place: Place, row: ShardStatus | None) -> tuple[str, ...]:
    owner, state = ("-", "-") if row is None else (row.owner or "-", row.state)
    return (key, str(place.index), str(place.generation), owner, state, place.queue)


def _to_json(located: Located, rows: dict[str, ShardStatus]) -> dict[str, Any]:
    places = []
    for place in located.places:
        row = rows.get(place.queue)
        places.append(
            {
                "generation": place.generation,
                "shard": place.index,
                "queue": place.queue,
                "takes_new": place.generation == located.takes,
                "owner": None if row is None else row.owner,
                "state": None if row is None else row.state,
            }
        )
    return {"key": located.key, "waits_in": located.waits_in, "places": places}
