"""`celery -A app shards …`: look at the groups of an app, and operate them.

The verbs only parse, call, and print: `monitoring` knows what is so, `operations` does things. Results go to stdout,
JSON alone; messages go to stderr. Passwords of brokers are never printed. `exits` has the exit codes.

Every `celery` command loads this package, the start of a worker included, so a verb is imported when it is used.
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
    """The verbs by name, each imported when it is asked for. Made of their places: "module of this package:name"."""

    def __getitem__(self, name: str) -> click.Command:
        module, _, command = self.data[name].partition(":")
        found: click.Command = getattr(import_module(f"{__name__}.{module}"), command)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        # Not as inherited, which takes an error of the import for a missing name.
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
            "export": "declaring:export",
            "flower": "serving:flower",
            "exporter": "serving:exporter",
        }
    ),
)
def shards() -> None:
    """Show shard groups and operate them: declare, pause, resume, purge, remove.

    \b
    Examples:
      celery -A shop shards status
      celery -A shop shards status orders --json
      celery -A shop shards declare

    Exits with 0 if all is well, 1 if something is wrong with a group or a claim, 2 for wrong usage or configuration,
    and 69 if the broker, or the store of claims, is out of reach.
    """
    # py-amqp warns of deliveries that cross the closing of a channel; they are harmless.
    logging.getLogger("amqp").setLevel(logging.ERROR)
