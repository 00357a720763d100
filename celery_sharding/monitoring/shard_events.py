"""What happened to one shard lately: its handovers, failures and dead letters, from the end of the journal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery_sharding.errors import LogError
from celery_sharding.rabbitmq.channels import Opener
from celery_sharding.rabbitmq.streams import read_backwards
from celery_sharding.timestamps import read_moment
from celery_sharding.topology import Names

# Most of a journal is vitals: a busy day has millions, too many to wait for.
_LOOK_BACK_SECONDS = 2.0
_EACH = 5
_KINDS = {"handover": "handovers", "failure": "failures", "dead": "dead_letters"}


@dataclass(frozen=True, slots=True)
class ShardEvents:
    """The last few events of each kind, oldest first. The journal was read back to `since` (epoch; None: empty).

    No event holds a key; failures have the type of the error, not its text.
    """

    since: float | None
    by_kind: Mapping[str, tuple[Mapping[str, Any], ...]]


def read_shard_events(connection: Opener, names: Names, queue: str) -> ShardEvents:
    """Read what happened to `queue`, as far back as a short read gets.

    Raises:
        LogError: The journal could not be read. One that does not exist is empty.
    """
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in _KINDS.values()}
    since: float | None = None
    gives_up_at = time.monotonic() + _LOOK_BACK_SECONDS
    try:
        for batch in read_backwards(connection, names.journal):
            for _, event in reversed(batch):
                at = read_moment(event.get("at"))
                if at is None:
                    continue
                since = at
                kind = _KINDS.get(event["event"])
                if kind is not None and event.get("queue") == queue and len(found[kind]) < _EACH:
                    found[kind].append(event)
            if all(len(events) >= _EACH for events in found.values()) or time.monotonic() > gives_up_at:
                break
    except LogError as exc:
        if not exc.facts.get("missing"):
            raise
    return ShardEvents(since, {kind: tuple(reversed(events)) for kind, events in found.items()})
