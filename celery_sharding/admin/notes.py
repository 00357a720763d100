"""Notes for the history of a group: what an operator did, and what became of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from celery_sharding.errors import TopologyError
from celery_sharding.manifest import operated_event
from celery_sharding.streams import append
from celery_sharding.topology import Names, Opener, brief_channel


@contextlib.contextmanager
def noted(
    connection: Opener, names: Names, verb: str, *, by: str, before: bool, result: Callable[[], str], **facts: Any
) -> Iterator[None]:
    """Note what is done in the `with` block when it is over, also if the group refused to go on.

    A connection that is lost leaves no way to the history; hence `before`.

    Args:
        before: Note that it is begun, too.
        result: Says what was done so far.
        facts: Of the note, such as `count`.
    """

    def note(text: str) -> None:
        with brief_channel(connection) as channel:
            append(channel, names.manifest, operated_event(verb, by=by, result=text, **facts))

    if before:
        note("begun")
    try:
        yield
    except TopologyError as exc:
        note(f"{result()}, then: {exc}")
        raise
    note(result())
