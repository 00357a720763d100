"""How old records of a manifest may go: snapshots of the layout, and readers that begin at one.

The manifest keeps its last 32 MB (`topology`). So that the layout never goes with older records, a reader that is at
the end appends a *snapshot*, once some hundred records came since the last one:

    snapshot   {"through": offset, "state": the layout that the records up to that offset fold into}

It needs no lock: the state is a pure function of the log. A reader that has read everything before it ignores it. A
reader that begins where older records are missing keeps what it reads until the first snapshot whose `through` covers
all that is missing, takes its state, and folds what came after it. So the layout is the same whatever is missing.

Any reader may append one, except one that does not know the protocol of the group and so cannot compute the state. What
is not in the state is forgotten with the records: an event that says more than the layout holds needs a protocol of its
own.

A record takes about 300 bytes, a nonce included, and a snapshot a few kB, 100 kB in a group of 999 shards. So at least
a hundred snapshots are among the records that are kept, even if nobody but a monitor reads the manifest for a year.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Mapping
from typing import Any

from celery_sharding.layout.fold import fold
from celery_sharding.layout.model import Layout, OpenSwitch, Segment
from celery_sharding.layout.protocol import FIELD, is_known, protocol_of
from celery_sharding.rabbitmq.events import DAMAGED, read_fields, read_whole
from celery_sharding.rabbitmq.streams import NONCE, Event

logger = logging.getLogger(__name__)

SNAPSHOT = "snapshot"
# Records after which a reader appends the next snapshot. Each draws its own number, so that few do it at once.
EVERY_MIN, EVERY_MAX = 200, 400


class Reading:
    """Folds the records of a manifest, also if the first of them are gone.

    Args:
        layout: What is known already, up to its `through`; None: nothing is.

    Attributes:
        start: Where the folding began: what was known, or the state of a snapshot.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        self.start = self._layout = layout or Layout()
        self._next = self._layout.through + 1
        self._has_begun = False
        self._first: int | None = None
        self._waiting: list[tuple[int, Event]] = []
        self._snapshot_at = self._next
        self._every = random.randint(EVERY_MIN, EVERY_MAX)

    def note(self, offset: int, event: Event | None) -> None:
        """Take the next record, at `offset`; None if it is no event. Those that came before are passed over."""
        if offset < self._next:
            return
        if not self._has_begun:
            self._has_begun = True
            # Of a segment but the first, the broker keeps the first offset to itself (seen on 3.10 and 4.3), so the
            # next record may be the next but one. In the middle of a reading nothing can be missing.
            if offset > self._next + 1:
                self._first = offset
        self._next = offset + 1
        if event is None or event["event"] == NONCE:
            return
        found = _read_state(event, offset) if event["event"] == SNAPSHOT else None
        if found is not None:
            # One that covers little does not delay one that covers more.
            self._snapshot_at = max(self._snapshot_at, found.through + 1)
        if self._first is None:
            self._layout = fold(self._layout, offset, event)
            return
        self._waiting.append((offset, event))
        if found is not None and found.through >= self._first - 1:
            self.start = self._layout = found
            waiting, self._waiting = self._waiting, []
            self._first = None
            for number, kept in waiting:
                if number > found.through:
                    self._layout = fold(self._layout, number, kept)

    @property
    def layout(self) -> Layout:
        """What the manifest says up to the last record; as it was known before while `misses` is not None."""
        return dataclasses.replace(self._layout, through=self._next - 1)

    @property
    def misses(self) -> int | None:
        """The first record there is, if those before it are gone and no snapshot takes their place."""
        return self._first

    @property
    def is_snapshot_due(self) -> bool:
        """Whether this reader is to append a snapshot; it may do so."""
        is_due = self._next - self._snapshot_at >= self._every
        return is_due and self._first is None and is_known(self._layout.protocol)

    def make_snapshot(self, *, by: str) -> Event:
        """Return the snapshot of what was read; another is not due until as many records came again."""
        self._snapshot_at = self._next
        return snapshot_event(self.layout, by=by)


def snapshot_event(layout: Layout, *, by: str) -> Event:
    """Return the event that stands for all records up to `layout.through`."""
    state = dataclasses.asdict(layout) | {
        "segments": [_segment_to_json(segment) for segment in layout.segments],
        "paused": sorted(layout.paused, key=lambda shard: -1 if shard is None else shard),
    }
    del state["protocol"], state["through"]
    event = {"event": SNAPSHOT, "through": layout.through, "state": state, "by": by, "at": time.time()}
    return event if layout.protocol == 1 else {**event, FIELD: layout.protocol}


def _segment_to_json(segment: Segment) -> dict[str, Any]:
    unordered = ("drained", "reached", "unfinished")
    return dataclasses.asdict(segment) | {name: sorted(getattr(segment, name)) for name in unordered}


def _read_state(event: Mapping[str, Any], offset: int) -> Layout | None:
    """Return the layout of a snapshot at `offset`; of a newer protocol as far as it can be read; None if it is damaged.

    Whoever may write to the manifest may have sent it, so each field is what `snapshot_event` writes, or it is damaged.
    """
    protocol, through = protocol_of(event), event.get("through")
    try:
        if not -1 <= read_whole(through) < offset:
            raise ValueError(f"at {offset}, and through {through}")
        state = event["state"]
        said, switch = state | {"protocol": protocol, "through": through}, state["switch"]
        if switch is not None:
            switch = OpenSwitch(**read_fields(OpenSwitch, switch, complete=True))
        segments = tuple(_read_segment(each) for each in state["segments"])
        return Layout(**read_fields(Layout, said, complete=True), segments=segments, switch=switch)
    except DAMAGED as exc:
        if not is_known(protocol) and isinstance(through, int) and -1 <= through < offset:
            return Layout(protocol=protocol, through=through)
        logger.warning("manifest: a snapshot cannot be read (%r)", exc)
        return None


def _read_segment(state: Mapping[str, Any]) -> Segment:
    kind = state["kind"]
    if kind not in ("limbo", "ring"):
        raise ValueError(f"a segment of kind {kind!r}")
    return Segment(kind, **read_fields(Segment, state, complete=True))
