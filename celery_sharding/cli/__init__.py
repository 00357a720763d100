"""`celery -A app shards …`: look at the groups of an app, and operate them.

The commands only parse, call, and print: what is shown comes from `admin.snapshot`, what is done is done in `admin`.
Results go to stdout, JSON alone; messages go to stderr. Exit codes: 0 ok, 1 something is wrong with a group, 2 usage or
configuration, 69 the broker is out of reach. Broker passwords are never printed.
"""

from __future__ import annotations

import logging

import click

from celery_sharding.cli.dead_letters import dead_letters
from celery_sharding.cli.declaring import declare, list_groups
from celery_sharding.cli.dedup import dedup
from celery_sharding.cli.describe import describe
from celery_sharding.cli.doctor import doctor
from celery_sharding.cli.exits import Verbs
from celery_sharding.cli.exporter import exporter
from celery_sharding.cli.exporting import export
from celery_sharding.cli.flower import flower
from celery_sharding.cli.locate import locate
from celery_sharding.cli.pausing import history, pause, resume
from celery_sharding.cli.removing import gc, purge, remove
from celery_sharding.cli.status import status
from celery_sharding.worker.remote import install_commands

# Celery's command line loads this package before it checks the name of what it is to inspect.
install_commands()


@click.group(cls=Verbs)
def shards() -> None:
    """Look at shard groups, declare, pause and resume them.

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


for command in (
    list_groups,
    status,
    describe,
    locate,
    declare,
    doctor,
    pause,
    resume,
    history,
    dead_letters,
    dedup,
    purge,
    gc,
    remove,
    export,
    flower,
    exporter,
):
    shards.add_command(command)
