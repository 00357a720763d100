"""Each queue in the last minutes, from the journal: its trend, and what happened. Knows no broker and no Flower.

    vitals                      lag and rate of every second, merged into one point every `STEP_SECONDS`
    failure, handover, dead     the last `EVENTS_MAX` of a queue

After a lost connection some events of the journal are read again; they count once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_sharding.journal.events import ShardVitals, Vitals
from celery_sharding.timestamps import read_moment

WINDOW_SECONDS = 600.0
STEP_SECONDS = 5.0
# As long as the journal keeps them: the owner's loss matters most while there is none.
KEEP_SECONDS = 86_400.0
EVENTS_MAX = 50
_SHOWN = ("failure", "handover", "dead")


@dataclass(slots=True)
class Point:
    """`STEP_SECONDS` from `at` on: the largest lag, and how many messages were done."""

    at: float
    lag_seconds: float
    done: int = 0

    @property
    def rate(self) -> float:
        return self.done / STEP_SECONDS


@dataclass(slots=True)
class _Queue:
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=int(WINDOW_SECONDS / STEP_SECONDS) + 1))
    events: list[Mapping[str, Any]] = field(default_factory=list)
    owner: tuple[str, float] | None = None
    at: float = 0.0
    done: int = 0

    @property
    def heard_at(self) -> float:
        return max([self.at, *(float(event["at"]) for event in self.events[-1:])])


class Recent:
    """Notes events of journals, by queue. Safe for threads.

    A queue without events for `KEEP_SECONDS` is forgotten: generations come and go.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._swept_at = 0.0
        self._lock = threading.Lock()

    def note(self, group: str, event: Mapping[str, Any]) -> None:
        """Note one event of a group's journal; other kinds and damaged ones are ignored."""
        name, at = event.get("event"), read_moment(event.get("at"))
        if at is None:
            return
        with self._lock:
            if at - self._swept_at > WINDOW_SECONDS / 10:
                self._sweep(min(at, time.time()))  # a clock may be wrong
            if (vitals := Vitals.parse(event)) is not None:
                for queue, shard in vitals.owned.items():
                    self._note_vitals(queue, shard)
            elif name in _SHOWN and isinstance(event.get("queue"), str):
                self._note_event(event["queue"], event)

    def points(self, queue: str, *, now: float) -> list[Point]:
        """Return the finished steps of the last `WINDOW_SECONDS`, oldest first; none for times without an owner."""
        with self._lock:
            known = self._queues.get(queue)
            points = () if known is None else known.points
            return [point for point in points if STEP_SECONDS <= now - point.at <= WINDOW_SECONDS]

    def events(self, queue: str) -> list[Mapping[str, Any]]:
        """Return the events of a queue, the latest first."""
        with self._lock:
            known = self._queues.get(queue)
            return [] if known is None else known.events[::-1]

    def _sweep(self, now: float) -> None:
        self._swept_at = now
        self._queues = {name: each for name, each in self._queues.items() if now - each.heard_at <= KEEP_SECONDS}

    def _note_vitals(self, name: str, said: ShardVitals) -> None:
        at, owner, lag, done = said.at, (said.owner, said.since), said.lag_seconds or 0.0, said.counters.get("done", 0)
        queue = self._queues.setdefault(name, _Queue())
        if at <= queue.at:  # it was read before, or its owner's clock is behind the earlier owner's
            return
        step = at // STEP_SECONDS * STEP_SECONDS
        if not queue.points or queue.points[-1].at < step:
            queue.points.append(Point(step, lag))
        point = queue.points[-1]
        point.lag_seconds = max(point.lag_seconds, lag)
        if owner == queue.owner:
            point.done += max(0, done - queue.done)
        elif queue.owner is not None:  # a new owner counts from 0; when the first began is unknown
            point.done += done
        queue.owner, queue.at, queue.done = owner, at, done

    def _note_event(self, name: str, event: Mapping[str, Any]) -> None:
        events = self._queues.setdefault(name, _Queue()).events
        if event not in events:
            events.append(event)
            events.sort(key=lambda each: float(each["at"]))
            del events[:-EVENTS_MAX]
