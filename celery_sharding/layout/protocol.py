"""Versions side by side: which protocol an event or a control message asks for, and what this version does about it.

Every event of a manifest, and every control message in a shard queue, may say `"protocol": n`: from then on, only a
version that knows protocol n may act on the group. Without it, n is 1. A later version announces what it adds by an
event `requires` in the manifest, before it first uses it.

A version that reads a higher number than `PROTOCOL` leaves the group alone:

    worker      finishes what runs, gives its shards up, writes nothing more of the group, and waits to be replaced.
                Other groups and ordinary queues go on
    publisher   publishes to what exists, since it knows the exchange only; declares nothing
    operator    commands that would change something are refused; those that look say so
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_sharding.errors import ProtocolTooOld

# The highest that this version knows.
PROTOCOL = 1
FIELD = "protocol"


def protocol_of(said: Mapping[str, Any] | None) -> int:
    """Return the protocol that an event, or the headers of a control message, ask for; 1 if they say nothing."""
    value = (said or {}).get(FIELD)
    return value if isinstance(value, int) and not isinstance(value, bool) else 1


def is_known(protocol: int) -> bool:
    """Tell whether this version may act on what asks for `protocol`."""
    return protocol <= PROTOCOL


def describe_need(protocol: int) -> str:
    """Return what is wrong with a group that asks for a `protocol` that is not known here, and the fix."""
    return (
        f"needs protocol {protocol}, and this celery-sharding knows protocol {PROTOCOL}; upgrade it to a version that "
        f"knows protocol {protocol}"
    )


def check_protocol(group: str, protocol: int) -> None:
    """Raise `ProtocolTooOld` if this version may not act on the group."""
    if not is_known(protocol):
        raise ProtocolTooOld(
            f"group {group!r} {describe_need(protocol)}. Nothing was changed",
            group=group,
            needed=protocol,
            known=PROTOCOL,
        )
