"""What every verb needs first: the groups of the app, and a connection to its broker."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
from collections.abc import Iterator
from typing import Any

import click
from amqp import exceptions as amqp_errors
from kombu import Connection
from kombu.exceptions import OperationalError

from celery_sharding.brokers.base import Backing
from celery_sharding.cli.exits import WrongUsage
from celery_sharding.config import ShardGroup
from celery_sharding.errors import BrokerUnavailable
from celery_sharding.extension import Sharding
from celery_sharding.layout.contents import group_exists
from celery_sharding.rabbitmq.connect import close_connection, open_connection
from celery_sharding.shard_names import parse_shard
from celery_sharding.topology import Names

NOT_DECLARED = "not declared; run `celery shards declare` or start a worker"
_NO_SHARDING = """this app has no shard groups. Name the right app with `celery -A`, or add these two lines to it:

    from celery_sharding import Sharding, ShardGroup
    Sharding(app, groups=[ShardGroup("orders", shards=8)])"""


def find_sharding(ctx: click.Context) -> Sharding:
    sharding = getattr(ctx.obj.app, "sharding", None)
    if not isinstance(sharding, Sharding):
        raise WrongUsage(_NO_SHARDING)
    return sharding


def find_on_rabbitmq(ctx: click.Context, verb: str) -> Sharding:
    """Return the `Sharding` of the app, for a `verb` that an embedded broker does not serve.

    Raises:
        UnsupportedBroker: The broker is an embedded one.
    """
    sharding = find_sharding(ctx)
    open_backing(sharding).require_logs(f"`shards {verb}`")
    return sharding


def choose_groups(sharding: Sharding, name: str | None) -> list[ShardGroup]:
    settings = sharding.settings
    if name is not None:
        return [settings.group(name, needed_by="the command line")]
    if not settings.groups:
        raise WrongUsage("no shard group is configured; give Sharding(app, groups=[…]) one")
    return [settings.groups[each] for each in sorted(settings.groups)]


def choose_shard(sharding: Sharding, text: str) -> tuple[ShardGroup, int | None]:
    """Read `orders`, `orders/3` or `orders.003`: the group and the shard's index, None for the whole group."""
    found = parse_shard(text, sharding.settings)
    if found is None:
        group = sharding.settings.group(text.replace(".", "/").partition("/")[0], needed_by="the command line")
        raise WrongUsage(f"{text!r} is no shard of {group.name!r}; name one as {group.name}/0")
    return found


def operator_name() -> str:
    """Return the operator as the history of a group names them."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # KeyError up to Python 3.12: the user of a container may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def open_backing(sharding: Sharding) -> Backing:
    try:
        for url in sharding.connect().alt:
            Connection(url)  # kombu reads the URLs behind the first only when it needs them
        return sharding.backing()
    except ValueError:
        # The text of this error may contain a part of the password.
        raise WrongUsage(
            "the broker's URL cannot be read; percent-encode special characters in its user and password, '/' as %2F"
        ) from None
    except KeyError as exc:
        raise WrongUsage(f"the broker's URL cannot be used: {exc}") from exc


def resolve_groups(sharding: Sharding, name: str | None) -> list[str]:
    """Return the name of one group, as `resolve_group` does, or of all that are configured."""
    return [each.name for each in choose_groups(sharding, None)] if name is None else [resolve_group(sharding, name)]


def resolve_group(sharding: Sharding, name: str) -> str:
    """Return the name of a group that is configured, or still on the broker.

    Raises:
        UnknownGroup: It is neither.
    """
    if name not in sharding.settings.groups:
        ShardGroup(name, shards=1)  # refuses what cannot be a name
        with connected(sharding) as connection:
            if group_exists(connection, Names(name)):
                return name
    return sharding.settings.group(name, needed_by="the command line").name


@contextlib.contextmanager
def connected(sharding: Sharding) -> Iterator[Any]:
    """Yield an open connection to the broker.

    Raises:
        BrokerUnavailable: It could not be made, or was lost.
    """
    connection: Any = sharding.connect()
    try:
        yield open_connection(connection)
    except (OperationalError, amqp_errors.ConnectionError, amqp_errors.AccessRefused, OSError) as exc:
        raise BrokerUnavailable(
            f"the broker {connection.as_uri()} could not be reached ({exc}); check its URL, and that it is up"
        ) from exc
    finally:
        close_connection(connection)
