"""Who owns what, folded from the vitals that each worker writes into the journal once a second.

`VitalsLog` folds event by event, and knows no broker; `read_vitals` reads as much of the journal as it needs, from its
end.

Moments are those of the workers' clocks: a host whose clock is seconds behind looks as if it were gone. A worker that
shuts down warm says nothing any more, so what it still runs counts as unowned.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_sharding.errors import LogError
from celery_sharding.streams import Event, read_backwards
from celery_sharding.topology import Names, Opener

FRESH_SECONDS = 5.0
# How long, and how far, to look for the last owner of a queue that has none.
_LOOK_BACK_SECONDS, _LOOK_BACK_EVENTS = 0.5, 5_000


@dataclass(frozen=True, slots=True)
class Vital:
    """What a worker last said of a queue that it owns.

    `since` and `at` are seconds since the epoch. `lag_seconds` is None if nothing waited in its lanes. `counters` are
    totals since `since`: done, failed, retried, lost, killed, dead and what `Shard.count` counts besides.
    """

    owner: str
    at: float
    since: float
    held: int
    running: int
    lag_seconds: float | None
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Vitals:
    """By queue: its owner, who stands by, and the last known owner, however long ago."""

    owners: Mapping[str, Vital] = field(default_factory=dict)
    standbys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    last: Mapping[str, Vital] = field(default_factory=dict)


class VitalsLog:
    """What the vitals said so far, noted in the order of the journal. Not safe for threads."""

    def __init__(self) -> None:
        self._latest: dict[str, _Report] = {}
        self._last: dict[str, Vital] = {}

    def note(self, event: Mapping[str, Any]) -> None:
        """Note one event; others than vitals, and damaged ones, are passed over."""
        report = _read_report(event)
        if report is not None:
            self._latest[report.by] = report
            self._last |= report.owned

    def at(self, now: float) -> Vitals:
        """Return who owns what at `now`.

        The last word of each worker counts, unless it is older than `FRESH_SECONDS`. If two claim a queue, it belongs
        to the one who took it later.
        """
        owners: dict[str, Vital] = {}
        standbys: dict[str, list[str]] = {}
        for report in self._latest.values():
            if now - report.at > FRESH_SECONDS:
                continue
            for queue, vital in report.owned.items():
                other = owners.get(queue)
                if other is None or (vital.since, vital.at) > (other.since, other.at):
                    owners[queue] = vital
            for queue in report.standby:
                standbys.setdefault(queue, []).append(report.by)
        return Vitals(owners, {queue: tuple(sorted(workers)) for queue, workers in standbys.items()}, dict(self._last))


def fold_vitals(events: Iterable[Mapping[str, Any]], *, now: float) -> Vitals:
    """Return who owns what at `now`, from events in the order of the journal."""
    log = VitalsLog()
    for event in events:
        log.note(event)
    return log.at(now)


def read_vitals(connection: Opener, names: Names, *, backlogged: Collection[str] = ()) -> Vitals:
    """Read who owns what now.

    Args:
        backlogged: Queues with waiting messages, whose last owner is looked for further back, within limits.

    Raises:
        LogError: The journal could not be read. One that does not exist is empty.
    """
    events: list[Event] = []
    gives_up_at = time.monotonic() + _LOOK_BACK_SECONDS
    vitals = Vitals()
    try:
        for batch in read_backwards(connection, names.journal):
            events = [event for _, event in batch] + events
            now = time.time()
            vitals = fold_vitals(events, now=now)
            if not any(_is_stale(event, now) for event in events):
                continue
            if all(queue in vitals.last for queue in backlogged):
                break
            if time.monotonic() > gives_up_at or len(events) > _LOOK_BACK_EVENTS:
                break
    except LogError as exc:
        if not exc.facts.get("missing"):
            raise
    return vitals


@dataclass(frozen=True, slots=True)
class _Report:
    by: str
    at: float
    owned: Mapping[str, Vital]
    standby: tuple[str, ...]


def _is_stale(event: Event, now: float) -> bool:
    at = event.get("at")
    return isinstance(at, int | float) and now - at > FRESH_SECONDS


def _read_report(event: Mapping[str, Any]) -> _Report | None:
    """Return what a `vitals` event says, None if it is another or cannot be read."""
    if event.get("event") != "vitals":
        return None
    try:
        by, at = str(event["by"]), float(event["at"])
        owned = {queue: _read_vital(by, at, facts) for queue, facts in event["owned"].items()}
        return _Report(by, at, owned, tuple(map(str, event["standby"])))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _read_vital(by: str, at: float, facts: Mapping[str, Any]) -> Vital:
    since, lag = facts.get("since"), facts.get("lag_seconds")
    return Vital(
        owner=by,
        at=at,
        since=at if since is None else float(since),
        held=int(facts["held"]),
        running=int(facts["running"]),
        lag_seconds=None if lag is None else float(lag),
        counters={str(name): int(count) for name, count in facts.get("counters", {}).items()},
    )
