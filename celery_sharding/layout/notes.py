"""Notes for the history of a group: what an operator did, and what became of it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from celery_sharding.errors import TopologyError
from celery_sharding.layout.manifest import load_to_write, operated_event
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.streams import append
from celery_sharding.topology import Names


@contextlib.contextmanager
def noted(
    connection: Opener, names: Names, verb: str, *, by: str, result: Callable[[], str], **facts: Any
) -> Iterator[None]:
    """Note that what is done in the `with` block is begun, and how it ended, also if the group refused to go on.

    A process that is killed, or has lost its connection, writes no end.

    Args:
        result: Says what was done so far.
        facts: Of the note, such as `count`.

    Raises:
        ProtocolTooOld: This version may not act on the group; nothing is begun.
    """

    load_to_write(connection, names)
    operation = uuid.uuid4().hex

    def note(text: str) -> None:
        with brief_channel(connection) as channel:
            event = operated_event(verb, by=by, result=text, operation=operation, **facts)
            append(channel, names.manifest, event)

    note("begun")
    try:
        yield
    except (TopologyError, KeyboardInterrupt) as exc:
        note(f"{result()}, then: {exc or 'interrupted'}")
        raise
    note(result())
