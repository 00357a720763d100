"""What an operator does to a group goes into its history: that it was begun, and how it ended."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from celery_sharding.errors import TopologyError
from celery_sharding.layout.events import Operated
from celery_sharding.layout.manifest import load_to_write
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.streams import append
from celery_sharding.topology import Names


class Operation:
    """An operation under way. `result` says in words what was done so far; whoever does it keeps it up to date."""

    def __init__(self, result: str) -> None:
        self.result = result


@contextlib.contextmanager
def recorded(
    connection: Opener, names: Names, verb: str, *, by: str, result: str, facts: Mapping[str, Any]
) -> Iterator[Operation]:
    """Record that what is done in the `with` block is begun, and how it ended, also if the group refused to go on.

    A process that is killed, or has lost its connection, records no end.

    Args:
        result: Of the operation, before anything is done.
        facts: Of the record, such as `count`.

    Raises:
        ProtocolTooOld: This version may not act on the group; nothing is begun.
    """
    load_to_write(connection, names)
    operation, key = Operation(result), uuid.uuid4().hex

    def record(text: str) -> None:
        with brief_channel(connection) as channel:
            append(channel, names.manifest, Operated(verb, by, text, key, facts).as_dict())

    record("begun")
    try:
        yield operation
    except (TopologyError, KeyboardInterrupt) as exc:
        record(f"{operation.result}, then: {exc or 'interrupted'}")
        raise
    record(operation.result)
