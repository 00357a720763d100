"""The least permissions on the broker: the one place that says who needs what.

    publisher   publishes, once the group is declared. If it may be the first and so declares the group, it needs what a
                worker needs, but for Celery's own names.
    worker      everything of the group, and Celery's own queues and exchanges; also `shards declare` and removing.
    operator    status, describe, locate, doctor, history, pause and resume, dead letters. It declares nothing, but
                RabbitMQ 4.3 asks for the right to configure at a passive declaration; up to 4.0 `admin`, `dead.admin`
                and `locate.…` are enough.

Write on `amq.default` lets a user put messages into any queue of the virtual host, by its name. The logs are written
that way, and also read: a reader appends a nonce to find the end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from celery_sharding.topology import PREFIX

Role = Literal["publisher", "worker", "operator"]
ROLES: tuple[Role, ...] = ("publisher", "worker", "operator")
_NOTHING = "^$"
_DEFAULT_EXCHANGE = r"amq\.default$"


@dataclass(frozen=True, slots=True)
class Permissions:
    """What `rabbitmqctl set_permissions` takes: three regular expressions on names."""

    configure: str
    write: str
    read: str


def permissions_for(role: Role, groups: Sequence[str], *, celery_names: Collection[str] = ()) -> Permissions:
    """Return the least permissions of `role` for `groups`.

    Args:
        groups: Names; at least one.
        celery_names: Regular expressions of what else a worker uses, each for a whole name (`celery_names`).
    """
    ours = _join(groups)
    if role == "publisher":
        return Permissions(_NOTHING, f"^{ours}$", _NOTHING)
    if role == "operator":
        return Permissions(
            configure=rf"^{ours}(\.|$)",
            write=rf"^({_DEFAULT_EXCHANGE}|{ours}($|\.locate\.))",
            read=rf"^{ours}\.((manifest|journal|dead)$|locate\.)",
        )
    everything = [rf"{ours}(\.|$)", *celery_names]
    return Permissions(_any(everything), _any([*everything, _DEFAULT_EXCHANGE]), _any(everything))


def celery_names(
    *, queues: Collection[str], control_exchange: str, event_exchange: str, event_queue_prefix: str, delays: bool
) -> list[str]:
    """Return the expressions for what a worker uses besides groups.

    Args:
        queues: Those that it consumes; their exchanges have the same names.
        delays: It uses Celery's native delayed delivery, as with ordinary quorum queues.
    """
    found = [f"{re.escape(name)}$" for name in sorted(set(queues))]
    found.append(rf"(.+\.)?{re.escape(control_exchange)}\.pidbox$")
    found += sorted({rf"{re.escape(name)}(\.|$)" for name in (event_exchange, event_queue_prefix)})
    return found + (["celery_delayed_"] if delays else [])


def _join(groups: Sequence[str]) -> str:
    names = sorted(groups)  # nothing in them is special in an expression
    return re.escape(PREFIX) + (names[0] if len(names) == 1 else f"({'|'.join(names)})")


def _any(expressions: Sequence[str]) -> str:
    return f"^{expressions[0]}" if len(expressions) == 1 else f"^({'|'.join(expressions)})"
