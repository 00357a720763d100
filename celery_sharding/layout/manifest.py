"""The manifest of a group: the stream of small events that its layout is folded from (`fold`).

Nothing else says how many shards are live, which limbo takes unrouted messages, or what is consumed next.

    layout events   created, switch, step, switched, ended, removed, pause, resume
                    written only under the group's lock. Each names in `base` the offset of the layout event it builds
                    on. If that is not the last one, the event is void: every reader ignores it (compare and set). So a
                    holder that lost the lock unnoticed changes nothing.
    facts           reached, finished, drained
                    written by the owner of a queue, without the lock, and any number of times.
    notes           operated
                    what an operator did that changes no layout (a replay, a purge): for the history only.
    snapshot        {through, state}: stands for all records up to `through`, which may go (`retention`).
    requires        {"protocol": n}: from now on only versions that know it may act on the group. Without the lock.

`events` has their shapes. Each may say which protocol its reader must know (`protocol`).

A segment is consumed until each of its queues is reported empty (`drained`), or empty but for a few keys that wait for
a retry (`reached`). Then the next segment is consumed, too, but holds those keys back until each is reported as
`finished` in the queue where it waits. So a key that retries for a long time holds up no other.

A switch is recorded before it is done (`switch`), and so is each of its steps (`step`) and its end (`switched`).
Segments enter the chain with `switch`. Consumers reach a segment only when all before it are passed, and a segment is
not ended before the switch away from it is over. So the order is right at every moment in between.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import Literal

from celery_sharding.errors import LogError, ManifestConflict, OutOfReach
from celery_sharding.layout.events import LayoutEvent
from celery_sharding.layout.model import Layout
from celery_sharding.layout.protocol import check_protocol
from celery_sharding.layout.retention import SNAPSHOT, Reading
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.connect import process_name
from celery_sharding.rabbitmq.streams import NONCE, Event, append, read_records
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)


def read(
    connection: Opener, names: Names, *, since: Layout | None = None, timeout_seconds: float = 30.0
) -> tuple[Reading, list[tuple[int, Event]]]:
    """Read the manifest to its end; return what it folds into, and the events after the start of that.

    Each call appends a nonce, so a process that looks often should tail the stream instead. If a snapshot is due, it is
    appended.

    Args:
        since: What is known already; must come from this manifest.

    Raises:
        LogError: The manifest was not read, is `missing`, or what is left of it does not say what the layout is.
    """
    start: Literal["first"] | int = "first" if since is None else since.through + 1
    records = read_records(connection, names.manifest, offset=start, timeout_seconds=timeout_seconds)
    reading = Reading(since)
    for offset, event in records:
        reading.note(offset, event)
    if reading.misses is not None:
        raise LogError(
            f"the manifest of group {names.group!r} begins at record {reading.misses}, and no snapshot covers those "
            "before it, so the layout is unknown. Its own retention never does that. Restore "
            f"{names.manifest!r}; if you delete it, the group is declared anew over queues that hold messages",
            stream=names.manifest,
            misses=reading.misses,
        )
    append_snapshot(connection, names, reading, timeout_seconds=timeout_seconds)
    since_start = reading.start.through
    kept = [(offset, event) for offset, event in records if event is not None and offset > since_start]
    return reading, [(offset, event) for offset, event in kept if event["event"] not in (NONCE, SNAPSHOT)]


def append_snapshot(connection: Opener, names: Names, reading: Reading, *, timeout_seconds: float = 30.0) -> None:
    """Append a snapshot if one is due; whoever reads next does it if this fails."""
    if not reading.is_snapshot_due:
        return
    event = reading.make_snapshot(by=process_name())
    try:
        with brief_channel(connection) as channel:
            append(channel, names.manifest, event, timeout_seconds=timeout_seconds)
    except (LogError, OutOfReach) as exc:
        logger.warning("group %s: a snapshot of its layout was not stored: %s", names.group, exc)


def load(connection: Opener, names: Names, *, since: Layout | None = None, timeout_seconds: float = 30.0) -> Layout:
    """Read the manifest to its end, as `read` does; without a manifest, return the empty layout.

    Raises:
        LogError: The manifest was not read.
    """
    try:
        reading, _ = read(connection, names, since=since, timeout_seconds=timeout_seconds)
    except LogError as exc:
        if exc.facts.get("missing"):
            return Layout()
        raise
    return reading.layout


def load_to_write(connection: Opener, names: Names) -> Layout:
    """Read the manifest to its end, before something of the group is changed.

    Raises:
        ProtocolTooOld: This version may not act on the group.
        LogError: The manifest was not read.
    """
    layout = load(connection, names)
    check_protocol(names.group, layout.protocol)
    return layout


def write(
    connection: Opener, names: Names, layout: Layout, event: LayoutEvent, *, by: str, timeout_seconds: float = 30.0
) -> Layout:
    """Append a layout event that builds on `layout`, and return the layout after it.

    Only under the group's lock, on the lock's own connection.

    Raises:
        ManifestConflict: The manifest had moved on: the event is void.
        ProtocolTooOld: This version may not act on the group; nothing was written.
        LogError: It is unknown whether the event was written. Read the manifest again.
    """
    check_protocol(names.group, layout.protocol)
    nonce = uuid.uuid4().hex
    body = {**event.as_dict(), "base": layout.offset, "by": by, "at": time.time(), "id": nonce}
    with brief_channel(connection) as channel:
        append(channel, names.manifest, body, timeout_seconds=timeout_seconds)
    reading, events = read(connection, names, since=layout, timeout_seconds=timeout_seconds)
    layout = reading.layout
    written = next((offset for offset, found in events if found.get("id") == nonce), None)
    if written is None or layout.offset != written:
        raise ManifestConflict(
            f"someone else changed group {names.group!r} while {event.name!r} was being written; nothing was changed",
            group=names.group,
        )
    return layout
