"""What other tools may declare of a group: as RabbitMQ definitions, or for RabbitMQ's operators on Kubernetes.

Only what may be declared again at any time without harm: the three fanout exchanges, a policy that guards the queues,
and permissions. A worker, or `shards declare`, declares the rest.

Never rings or shard queues: a ring is the order of its bindings. Nor the limbo and its binding: the group leaves one
limbo for the next, and importing the file again would lead messages into the old one. Without a limbo the broker
returns what is published before the group is declared, and the publisher gets an error.

No passwords: users must exist, or, for the operator, have a secret with `username` and `password`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from celery_sharding.operations.permissions import Permissions
from celery_sharding.topology import DELIVERY_LIMIT, Names, fanout_arguments, fanouts

# Above the usual priorities of policies for all queues; only the policy with the highest priority counts.
GUARD_PRIORITY = 100
_API = "rabbitmq.com/v1beta1"


@dataclass(frozen=True, slots=True)
class Fanout:
    """An exchange of the fixed part."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Guard:
    """A policy that changes nothing, but keeps policies for all queues away from those of a group."""

    name: str
    pattern: str
    definition: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Export:
    """What is written: for one virtual host. `users` are names and what they may do."""

    virtual_host: str
    fanouts: tuple[Fanout, ...]
    guards: tuple[Guard, ...]
    users: tuple[tuple[str, Permissions], ...]


def plan_export(groups: Sequence[str], *, virtual_host: str, users: Iterable[tuple[str, Permissions]]) -> Export:
    """Return what is to be written for `groups`, given by name."""
    names = [Names(group) for group in groups]
    return Export(
        virtual_host,
        tuple(Fanout(name, fanout_arguments(alternate)) for each in names for name, alternate in fanouts(each)),
        # Of policy and argument the lower limit counts, so this changes nothing for the queues.
        tuple(Guard(each.publish, rf"^shards\.{each.group}\.", {"delivery-limit": DELIVERY_LIMIT}) for each in names),
        tuple(users),
    )


def to_definitions(export: Export) -> str:
    """Return the JSON that `rabbitmqctl import_definitions` and the management API take."""
    at = {"vhost": export.virtual_host}
    found = {
        "exchanges": [
            at
            | {"name": each.name, "type": "fanout", "durable": True, "auto_delete": False, "internal": False}
            | {"arguments": each.arguments}
            for each in export.fanouts
        ],
        "policies": [
            at
            | {"name": each.name, "pattern": each.pattern, "apply-to": "queues", "priority": GUARD_PRIORITY}
            | {"definition": each.definition}
            for each in export.guards
        ],
        "permissions": [at | {"user": user} | dataclasses.asdict(allowed) for user, allowed in export.users],
    }
    return json.dumps(found, indent=2)


def to_operator(export: Export, *, cluster: str) -> str:
    """Return the YAML for RabbitMQ's messaging topology operator, for the RabbitmqCluster called `cluster`."""
    reference = {"rabbitmqClusterReference": {"name": cluster}}
    return "".join(
        f"---\n{_to_yaml({'apiVersion': _API, 'kind': kind, 'metadata': {'name': name}, 'spec': spec | reference})}"
        for kind, name, spec in _list_objects(export)
    )


def _list_objects(export: Export) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield kind, name in Kubernetes, and specification."""
    at = {"vhost": export.virtual_host}
    for each in export.fanouts:
        spec = {"name": each.name, **at, "type": "fanout", "durable": True, "autoDelete": False}
        yield "Exchange", _object_name(each.name), spec | ({"arguments": each.arguments} if each.arguments else {})
    for guard in export.guards:
        spec = {"name": guard.name, **at, "pattern": guard.pattern, "applyTo": "queues", "priority": GUARD_PRIORITY}
        yield "Policy", _object_name(guard.name), spec | {"definition": guard.definition}
    for user, allowed in export.users:
        name = _object_name(user)
        yield "User", name, {"importCredentialsSecret": {"name": f"{name}-credentials"}}
        permissions = {"permissions": dataclasses.asdict(allowed)}
        yield "Permission", name, {**at, "userReference": {"name": name}, **permissions}


def _object_name(name: str) -> str:
    """Return `name` as Kubernetes allows it: small letters, digits, and '-'."""
    return "".join(each if each.isascii() and each.isalnum() else "-" for each in name.lower()).strip("-")


def _to_yaml(value: dict[str, Any], indent: str = "") -> str:
    """Return a mapping of mappings and scalars as YAML, whose scalars are those of JSON."""
    lines = []
    for key, each in value.items():
        if isinstance(each, dict):
            lines.append(f"{indent}{key}:\n{_to_yaml(each, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(each)}\n")
    return "".join(lines)
