"""`celery -A app shards …`: look at the groups of an app, and operate them.

The commands only parse, call, and print: what is shown comes from `admin.snapshot`, what is done is done in `admin`.
Results go to stdout, JSON alone; messages go to stderr. Exit codes: 0 ok, 1 something is wrong with a group, 2 usage or
configuration, 69 the broker is out of reach. Broker passwords are never printed.

Every `celery` command loads this package, the start of a worker included: so a verb is imported when it is asked for.
"""

from __future__ import annotations

import logging
from collections import UserDict
from importlib import import_module
from typing import Any

import click

from celery_sharding.celery_hooks.installer import install_hooks
from celery_sharding.celery_hooks.table import Stage
from celery_sharding.cli.exits import Verbs
from celery_sharding.cli.forgotten import warn_of_forgotten

# Celery's command line loads this package before it checks the name of what it is to inspect.
install_hooks(Stage.COMMANDS)
warn_of_forgotten()


class Commands(UserDict[str, Any]):
    """The commands of a group, each imported when it is asked for.

    It is made of where each one is: "module of this package:name in it".
    """

    def __getitem__(self, name: str) -> click.Command:
        module, _, command = self.data[name].partition(":")
        found: click.Command = getattr(import_module(f"{__name__}.{module}"), command)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        # Not as inherited: an error of the import would be taken for a name that is not here.
        return self[name] if name in self.data else default


@click.group(
    cls=Verbs,
    commands=Commands(
        {
            "list": "declaring:list_groups",
            "status": "status:status",
            "describe": "describe:describe",
            "locate": "locate:locate",
            "declare": "declaring:declare",
            "doctor": "doctor:doctor",
            "pause": "pausing:pause",
            "resume": "pausing:resume",
            "history": "pausing:history",
            "dead-letters": "dead_letters:dead_letters",
            "dedup": "dedup:dedup",
            "purge": "removing:purge",
            "gc": "removing:gc",
            "remove": "removing:remove",
            "export": "exporting:export",
            "flower": "flower:flower",
            "exporter": "exporter:exporter",
        }
    ),
)
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
