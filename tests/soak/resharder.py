"""Gives a group another number of shards, as a process that may die in the middle; then the workers carry it on.

It tries again until the group is whole enough to begin: a switch may be under way, or the broker be gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import click
from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import OperationalError

from celery_sharding.config import ShardGroup
from celery_sharding.errors import ShardingError
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load
from celery_sharding.layout.switch import begin_reshard, carry_on
from celery_sharding.rabbitmq.connect import close_connection, open_connection
from celery_sharding.topology import Names
from soak.plan import SHARDS_MAX

_PAUSE_SECONDS = 0.5
_LOCK_SECONDS = 5.0
_BY = "resharder"


@click.command()
@click.option("--broker", required=True)
@click.option("--group", required=True)
@click.option("--shards", type=int, required=True, help="Another number if the group has as many.")
@click.option("--dies-after", type=int, default=None, help="The step after which it is killed.")
@click.option("--seconds", type=float, required=True, help="How long to try.")
def main(broker: str, group: str, shards: int, dies_after: int | None, seconds: float) -> None:
    """Print the number of shards that the group gets, and reshard."""
    deadline = time.time() + seconds
    wanted: ShardGroup | None = None
    while True:
        try:
            if wanted is None:
                wanted = ShardGroup(group, choose_shards(broker, group, shards))
                click.echo(wanted.shards)
                sys.stdout.flush()
            reshard(broker, wanted, dies_after)
            ensure_group(lambda: Connection(broker), wanted, owner=_BY)
        except (ShardingError, AMQPError, OperationalError, OSError) as error:
            if time.time() > deadline:
                sys.exit(f"{type(error).__name__}: {error}")
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def choose_shards(broker: str, group: str, shards: int) -> int:
    """Return a number of shards that the group does not have."""
    connection = open_connection(Connection(broker))
    try:
        return shards if load(connection, Names(group)).shards != shards else shards % SHARDS_MAX + 1
    finally:
        close_connection(connection)


def reshard(broker: str, wanted: ShardGroup, dies_after: int | None) -> None:
    """Reshard to `wanted`, unless an earlier call has begun that already, and be killed if told so."""
    names = Names(wanted.name)
    with (
        GroupLock(lambda: Connection(broker), names, timeout_seconds=_LOCK_SECONDS) as lock,
        lock.operation() as connection,
    ):
        layout = load(connection, names)
        if layout.shards != wanted.shards:
            layout = begin_reshard(connection, wanted, layout, shards=wanted.shards, by=_BY)
            carry_on(connection, wanted, layout, by=_BY, last_step=dies_after)
        if dies_after is not None:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
