"""Who owns what, folded from the vitals that each worker writes into the journal once a second.

`OwnershipLog` folds event by event, and knows no broker; `read_recent_events` reads as much of the journal as it needs,
from its end.

Moments are those of the workers' clocks: a host whose clock is seconds behind looks as if it were gone. A worker in a
warm shutdown writes no vitals, so what it still runs counts as unowned.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_sharding.errors import LogError
from celery_sharding.journal.events import ShardVitals, Vitals
from celery_sharding.rabbitmq.channels import Opener
from celery_sharding.rabbitmq.streams import Event, decode, read_backwards
from celery_sharding.rabbitmq.tail import Tail
from celery_sharding.topology import Names

FRESH_SECONDS = 5.0
# Over how long rates are measured.
WINDOW_SECONDS = 10.0
# An owner that has just taken a shard is still being delivered what waited there.
_TAKING_SECONDS = 1.0
# Workers that were not heard for this long are forgotten: names of containers never come again.
_FORGET_SECONDS = 60.0
# How long, and how far, to look for the last owner of a queue that has none.
_LOOK_BACK_SECONDS, _LOOK_BACK_EVENTS = 0.5, 5_000


@dataclass(frozen=True, slots=True)
class Ownership:
    """By queue: its owner's vitals, its standbys, and the last vitals of any owner, however old.

    `before` has earlier vitals of the owner, at most `WINDOW_SECONDS` old, to measure rates with.
    """

    owners: Mapping[str, ShardVitals] = field(default_factory=dict)
    standbys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    last: Mapping[str, ShardVitals] = field(default_factory=dict)
    before: Mapping[str, ShardVitals] = field(default_factory=dict)


class OwnershipLog:
    """What the vitals said so far, in the order of the journal. Not safe for threads."""

    def __init__(self) -> None:
        self._latest: dict[str, Vitals] = {}
        self._last: dict[str, ShardVitals] = {}
        self._recent: dict[str, deque[ShardVitals]] = {}

    def note(self, event: Mapping[str, Any]) -> None:
        """Note one event; other than vitals, and damaged ones, are ignored."""
        vitals = Vitals.parse(event)
        if vitals is not None:
            self._latest[vitals.by] = vitals
            for queue, shard in vitals.owned.items():
                self._last[queue] = shard
                self._note_recent(queue, shard)

    def _note_recent(self, queue: str, shard: ShardVitals) -> None:
        recent = self._recent.setdefault(queue, deque())
        if recent and not shard.follows(recent[-1]):
            recent.clear()
        if shard.at - shard.since >= _TAKING_SECONDS:
            recent.append(shard)
        while recent and shard.at - recent[0].at > WINDOW_SECONDS:
            recent.popleft()

    def keep(self, queues: Collection[str]) -> None:
        """Forget what was said of other queues: generations come and go."""
        self._last = {queue: shard for queue, shard in self._last.items() if queue in queues}
        self._recent = {queue: recent for queue, recent in self._recent.items() if queue in queues}

    def at(self, now: float) -> Ownership:
        """Return who owns what at `now`.

        The last vitals of each worker count, unless they are older than `FRESH_SECONDS`. If two workers claim a queue,
        it belongs to the one that took it later.
        """
        owners: dict[str, ShardVitals] = {}
        standbys: dict[str, list[str]] = {}
        self._latest = {by: vitals for by, vitals in self._latest.items() if now - vitals.at < _FORGET_SECONDS}
        for vitals in self._latest.values():
            if now - vitals.at > FRESH_SECONDS:
                continue
            for queue, shard in vitals.owned.items():
                other = owners.get(queue)
                if other is None or (shard.since, shard.at) > (other.since, other.at):
                    owners[queue] = shard
            for queue in vitals.standby:
                standbys.setdefault(queue, []).append(vitals.by)
        first = {queue: recent[0] for queue, recent in self._recent.items() if recent}
        return Ownership(
            owners,
            {queue: tuple(sorted(workers)) for queue, workers in standbys.items()},
            dict(self._last),
            {queue: shard for queue, shard in first.items() if queue in owners and owners[queue].follows(shard)},
        )


def fold_ownership(events: Iterable[Mapping[str, Any]], *, now: float) -> Ownership:
    """Return who owns what at `now`, from events in the order of the journal."""
    log = OwnershipLog()
    for event in events:
        log.note(event)
    return log.at(now)


def read_ownership(connection: Opener, names: Names, *, backlogged: Collection[str] = ()) -> Ownership:
    """Read who owns what now; a journal that does not exist is empty.

    Args:
        backlogged: Queues with waiting messages, whose last owner is looked for further back, within limits.

    Raises:
        LogError: The journal could not be read.
    """
    try:
        events = read_recent_events(connection, names, backlogged=backlogged)
    except LogError as exc:
        if not exc.facts.get("missing"):
            raise
        events = []
    return fold_ownership((event for _, event in events), now=time.time())


def listen_for_vitals(connection: Any, names: Names, *, seconds: float) -> Iterator[Vitals]:
    """Yield the vitals that workers write to the group's journal, which exists, during the next `seconds`."""
    heard: deque[Vitals] = deque()

    def note(body: bytes, offset: int) -> None:
        event = decode(body, stream=names.journal, offset=offset)
        vitals = None if event is None else Vitals.parse(event)
        if vitals is not None:
            heard.append(vitals)

    tail = Tail(connection, names.journal, "next", note)
    deadline = time.monotonic() + seconds
    while (left_seconds := deadline - time.monotonic()) > 0:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=left_seconds)
        while heard:
            yield heard.popleft()
    tail.close()


def read_recent_events(
    connection: Opener, names: Names, *, back_seconds: float = FRESH_SECONDS, backlogged: Collection[str] = ()
) -> list[tuple[int, Event]]:
    """Return the last events of the journal with their offsets: those of `back_seconds` at least, if there are so many.

    Args:
        backlogged: As for `read_ownership`.

    Raises:
        LogError: The journal could not be read, or there is none (`missing`).
    """
    events: list[tuple[int, Event]] = []
    gives_up_at = time.monotonic() + _LOOK_BACK_SECONDS
    for batch in read_backwards(connection, names.journal):
        events = [*batch, *events]
        since = time.time() - back_seconds
        if not any(_is_before(event, since) for _, event in events):
            continue
        owned = {queue for _, event in events if (vitals := Vitals.parse(event)) is not None for queue in vitals.owned}
        if owned.issuperset(backlogged):
            break
        if time.monotonic() > gives_up_at or len(events) > _LOOK_BACK_EVENTS:
            break
    return events


def _is_before(event: Event, moment: float) -> bool:
    at = event.get("at")
    return isinstance(at, int | float) and at < moment
