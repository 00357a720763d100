"""The least permissions on the broker: the one place that says who needs what.

    publisher   publishes, once the group is declared. One that may be the first declares it, and needs what a worker
                needs but for Celery's own names.
    worker      all of the group, and Celery's own queues and exchanges; also `shards declare` and what removes.
    operator    looks and acts on what is there: status, describe, locate, doctor, history, pause and resume, dead
                letters. It needs not declare, but RabbitMQ 4.3 wants the right to for a look at a queue (a passive
                declaration); up to 4.0 `admin`, `dead.admin` and `locate.…` are enough.

Write on `amq.default` lets a user put messages into any queue of the virtual host, by its name. The logs are written
that way, and read: their end is found by a nonce.
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
        celery_names: Regular expressions of what else a worker uses, each for a whole name (`task_names`).
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
    """Return the expressions for what a worker of Celery uses beside groups.

    Args:
        queues: Those that it consumes; their exchanges bear the same names.
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
