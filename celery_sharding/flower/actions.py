"""What operators do from Flower: pause, resume and replay, if the request is allowed to.

A POST is refused if

    it may come from another site        `check_origin`: the browser would add the operator's password by itself
    Flower has no login                  by Flower's own API: 401 unless FLOWER_UNAUTHENTICATED_API is set
    Flower runs with --read-only         403

An action takes the group's lock and waits for the broker, so it runs in a thread. The group's history names Flower's
user.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from amqp import exceptions as amqp_errors
from kombu.exceptions import OperationalError

from celery_sharding.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetterError,
    LogError,
    ManifestConflict,
    OutOfReach,
    ShardingError,
    TopologyError,
    UnknownGroup,
    UnknownShard,
)
from celery_sharding.extension import Sharding
from celery_sharding.operations import dead_letters
from celery_sharding.operations import pause as pausing

# Forms of other sites cannot send it, and no answer of Flower's allows their scripts to.
HEADER = "X-Requested-By"
_LOST = (BrokerUnavailable, OutOfReach, LogError, OperationalError, amqp_errors.AMQPError, OSError)
_VERBS = {"pause": (pausing.pause, "paused", "already paused"), "resume": (pausing.resume, "resumed", "not paused")}


class Refused(Exception):
    """A request that is refused; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_origin(headers: Mapping[str, str], host: str) -> None:
    """Raise `Refused` unless a POST was made by a page of this Flower, or by a program.

    Args:
        headers: Of the request; names ignore case.
        host: Where the request was sent, with its port.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    # A proxy may change the host, so the browser's header counts first.
    if site is not None and site != "same-origin":
        raise Refused(403, "this was sent from another site")
    if site is None and origin is not None and origin.partition("://")[2] != host:
        raise Refused(403, f"this was sent from another site, {origin}; a proxy before Flower must pass Host on")
    if not headers.get(HEADER):
        raise Refused(403, f"add the header {HEADER}, with any value: no other site can send it")


def set_paused(sharding: Sharding, verb: str, group_name: str, index: int | None, *, by: str) -> dict[str, Any]:
    """Pause or resume a group, or a shard of it, and return what to tell the user.

    Raises:
        ShardingError and errors of the connection, for `refusal_for`.
    """
    change, done, unchanged = _VERBS[verb]
    group = sharding.settings.group(group_name, needed_by="the address")
    changed = change(sharding.connect, group, index, by=by)
    place = group.name if index is None else f"{group.name}/{index}"
    return {"changed": changed, "message": f"{place}: {done if changed else unchanged}"}


def replay(sharding: Sharding, group_name: str, ids: Collection[str] | None, *, by: str) -> dict[str, Any]:
    """Replay dead letters of a group, None for all, and return what to tell the user. Errors as for `set_paused`."""
    group = sharding.settings.group(group_name, needed_by="the address")
    letters = dead_letters.replay(sharding.connect, group, ids, by=by)
    return {
        "changed": bool(letters),
        "message": f"{group.name}: {len(letters)} dead letters replayed",
        "ids": [letter.id for letter in letters],
    }


def refusal_for(exc: Exception) -> Refused | None:
    """Return how to answer an expected error of an action; None for other errors."""
    text = " ".join(str(exc).split())
    if isinstance(exc, UnknownGroup | UnknownShard):
        return Refused(404, text)
    if isinstance(exc, ManifestConflict):
        return Refused(409, text)
    if isinstance(exc, _LOST):
        return Refused(503, text or type(exc).__name__)
    if isinstance(exc, TopologyError | DeadLetterError):
        return Refused(409, text)
    if isinstance(exc, ConfigurationError | ShardingError):
        return Refused(500, text)
    return None
