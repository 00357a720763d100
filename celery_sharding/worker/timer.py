"""Calls at their moment: a thread of its own sleeps until the next is due, and posts it.

Celery's own timers are up to a second late (read in kombu 5.7.0 and Celery 5.7.0: the event loop fires them with
`min_delay=1`, and sleeps that long even if a timer is due sooner; the timer of pools without an event loop sleeps a
second after it was empty).

A timer outlives connections: each call checks whether what it is about is still there. Safe for threads.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from celery_sharding.worker.log import Poster

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Alarm:
    """One call that waits for its moment."""

    call: Callable[[], None]

    def ring(self) -> None:
        """Call; an error stops neither the timer nor the event loop."""
        try:
            self.call()
        except Exception:
            logger.exception("a call of a timer failed")


class Alarms:
    """What waits for its moment, by a clock that the caller reads. Not safe for threads."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Alarm]] = []  # a heap
        self._numbers = itertools.count()

    @property
    def next_at(self) -> float | None:
        """When the next is due; None if nothing waits."""
        return self._waiting[0][0] if self._waiting else None

    def add(self, due_at: float, alarm: Alarm) -> None:
        heapq.heappush(self._waiting, (due_at, next(self._numbers), alarm))

    def take_due(self, now: float) -> list[Alarm]:
        """Take what is due at `now`: by its moment, and of one moment by when it was asked for."""
        due = []
        while self._waiting and self._waiting[0][0] <= now:
            due.append(heapq.heappop(self._waiting)[2])
        return due


class Timer:
    """Calls functions after some seconds, where `calls` posts them."""

    def __init__(self, calls: Poster) -> None:
        self._calls = calls
        self._alarms = Alarms()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def call_after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call after some seconds; calls of the same moment are called in the order in which they were asked for."""
        due_at = time.monotonic() + max(0.0, seconds)
        with self._changed:
            if self._stopped:
                return
            self._alarms.add(due_at, Alarm(call))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shards-timer", daemon=True)
                self._thread.start()
            elif self._alarms.next_at == due_at:
                self._changed.notify()

    def stop(self) -> None:
        """Call nothing any more."""
        with self._changed:
            self._stopped = True
            self._alarms = Alarms()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and not (due := self._alarms.take_due(time.monotonic())):
                    next_at = self._alarms.next_at
                    self._changed.wait(None if next_at is None else max(0.0, next_at - time.monotonic()))
                if self._stopped:
                    return
            for alarm in due:
                self._calls.post(alarm.ring)
