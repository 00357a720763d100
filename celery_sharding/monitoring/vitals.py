"""Who owns what, folded from the vitals that each worker writes into the journal once a second.

`VitalsLog` folds event by event, and knows no broker; `read_recent` reads as much of the journal as it needs, from its
end.

Moments are those of the workers' clocks: a host whose clock is seconds behind looks as if it were gone. A worker that
shuts down warm says nothing any more, so what it still runs counts as unowned.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_sharding.errors import LogError
from celery_sharding.rabbitmq.channels import Opener
from celery_sharding.rabbitmq.streams import Event, read_backwards
from celery_sharding.timestamps import read_moment
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
class Vital:
    """What a worker last said of a queue that it owns.

    `since` and `at` are seconds since the epoch. `lag_seconds` is None if nothing waited in its lanes. `counters` are
    totals since `since`: delivered, done, failed, retried, lost, killed, dead and what `Shard.count` counts besides.
    `prefetch` is how many messages it may hold, `behind_seconds` the age of the newest that it was delivered.
    `store_waiting` and `claim_waiting` count the messages that wait at the heads of their lanes for the claim store,
    which has not answered since `store_away_since` (epoch seconds), and for claims of other runs.
    """

    owner: str
    at: float
    since: float
    held: int
    running: int
    lag_seconds: float | None
    counters: Mapping[str, int] = field(default_factory=dict)
    prefetch: int | None = None
    behind_seconds: float | None = None
    store_waiting: int = 0
    store_away_since: float | None = None
    claim_waiting: int = 0

    @property
    def delivered(self) -> int:
        return self.counters.get("delivered", 0)

    @property
    def has_room(self) -> bool:
        """Whether it holds so little that nothing can have waited for it on the broker."""
        return self.prefetch is not None and 2 * self.held < self.prefetch

    def follows(self, other: Vital) -> bool:
        """Tell whether `other` is an earlier word of the same worker on the same time of ownership."""
        same = (self.owner, self.since) == (other.owner, other.since)
        return same and self.at > other.at and self.delivered >= other.delivered


@dataclass(frozen=True, slots=True)
class Vitals:
    """By queue: its owner, who stands by, and the last known owner, however long ago.

    `before` has an earlier word of the owner, at most `WINDOW_SECONDS` old, to measure rates with.
    """

    owners: Mapping[str, Vital] = field(default_factory=dict)
    standbys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    last: Mapping[str, Vital] = field(default_factory=dict)
    before: Mapping[str, Vital] = field(default_factory=dict)


class VitalsLog:
    """What the vitals said so far, noted in the order of the journal. Not safe for threads."""

    def __init__(self) -> None:
        self._latest: dict[str, _Report] = {}
        self._last: dict[str, Vital] = {}
        self._recent: dict[str, deque[Vital]] = {}

    def note(self, event: Mapping[str, Any]) -> None:
        """Note one event; others than vitals, and damaged ones, are passed over."""
        report = _read_report(event)
        if report is not None:
            self._latest[report.by] = report
            for queue, vital in report.owned.items():
                self._last[queue] = vital
                self._note_recent(queue, vital)

    def _note_recent(self, queue: str, vital: Vital) -> None:
        recent = self._recent.setdefault(queue, deque())
        if recent and not vital.follows(recent[-1]):
            recent.clear()
        if vital.at - vital.since >= _TAKING_SECONDS:
            recent.append(vital)
        while recent and vital.at - recent[0].at > WINDOW_SECONDS:
            recent.popleft()

    def keep(self, queues: Collection[str]) -> None:
        """Forget what was said of other queues: generations come and go."""
        self._last = {queue: vital for queue, vital in self._last.items() if queue in queues}
        self._recent = {queue: vitals for queue, vitals in self._recent.items() if queue in queues}

    def at(self, now: float) -> Vitals:
        """Return who owns what at `now`.

        The last word of each worker counts, unless it is older than `FRESH_SECONDS`. If two claim a queue, it belongs
        to the one who took it later.
        """
        owners: dict[str, Vital] = {}
        standbys: dict[str, list[str]] = {}
        self._latest = {by: report for by, report in self._latest.items() if now - report.at < _FORGET_SECONDS}
        for report in self._latest.values():
            if now - report.at > FRESH_SECONDS:
                continue
            for queue, vital in report.owned.items():
                other = owners.get(queue)
                if other is None or (vital.since, vital.at) > (other.since, other.at):
                    owners[queue] = vital
            for queue in report.standby:
                standbys.setdefault(queue, []).append(report.by)
        first = {queue: recent[0] for queue, recent in self._recent.items() if recent}
        return Vitals(
            owners,
            {queue: tuple(sorted(workers)) for queue, workers in standbys.items()},
            dict(self._last),
            {queue: vital for queue, vital in first.items() if queue in owners and owners[queue].follows(vital)},
        )


def fold_vitals(events: Iterable[Mapping[str, Any]], *, now: float) -> Vitals:
    """Return who owns what at `now`, from events in the order of the journal."""
    log = VitalsLog()
    for event in events:
        log.note(event)
    return log.at(now)


def read_vitals(connection: Opener, names: Names, *, backlogged: Collection[str] = ()) -> Vitals:
    """Read who owns what now; a journal that does not exist is empty.

    Args:
        backlogged: Queues with waiting messages, whose last owner is looked for further back, within limits.

    Raises:
        LogError: The journal could not be read.
    """
    try:
        events = read_recent(connection, names, backlogged=backlogged)
    except LogError as exc:
        if not exc.facts.get("missing"):
            raise
        events = []
    return fold_vitals((event for _, event in events), now=time.time())


def read_recent(
    connection: Opener, names: Names, *, back_seconds: float = FRESH_SECONDS, backlogged: Collection[str] = ()
) -> list[tuple[int, Event]]:
    """Return the last events of the journal with their offsets: those of `back_seconds` at least, if there are so many.

    Args:
        backlogged: As for `read_vitals`.

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
        owned = {queue for _, event in events if (report := _read_report(event)) is not None for queue in report.owned}
        if owned.issuperset(backlogged):
            break
        if time.monotonic() > gives_up_at or len(events) > _LOOK_BACK_EVENTS:
            break
    return events


@dataclass(frozen=True, slots=True)
class _Report:
    by: str
    at: float
    owned: Mapping[str, Vital]
    standby: tuple[str, ...]


def _is_before(event: Event, moment: float) -> bool:
    at = event.get("at")
    return isinstance(at, int | float) and at < moment


def _read_report(event: Mapping[str, Any]) -> _Report | None:
    """Return what a `vitals` event says, None if it is another or cannot be read."""
    if event.get("event") != "vitals":
        return None
    try:
        by, at = str(event["by"]), read_moment(event["at"])
        if at is None:
            return None
        owned = {queue: _read_vital(by, at, facts) for queue, facts in event["owned"].items()}
        return _Report(by, at, owned, tuple(map(str, event["standby"])))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _read_vital(by: str, at: float, facts: Mapping[str, Any]) -> Vital:
    since, lag = read_moment(facts.get("since")), facts.get("lag_seconds")
    return Vital(
        owner=by,
        at=at,
        since=at if since is None else since,
        held=int(facts["held"]),
        running=int(facts["running"]),
        lag_seconds=None if lag is None else float(lag),
        counters={str(name): int(count) for name, count in facts.get("counters", {}).items()},
        prefetch=None if facts.get("prefetch") is None else int(facts["prefetch"]),
        behind_seconds=None if facts.get("behind_seconds") is None else float(facts["behind_seconds"]),
        store_waiting=int(facts.get("store_waiting", 0)),
        store_away_since=read_moment(facts.get("store_away_since")),
        claim_waiting=int(facts.get("claim_waiting", 0)),
    )
