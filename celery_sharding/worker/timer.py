"""Calls at their moment: by a thread of its own, which sleeps until the next is due and hands it to `post`.

    waiting ──due──▶ posted ──▶ called          ──cancel──▶ not called, also if it was posted already

Celery's own timers are up to a second late (read of kombu 5.7.0 and Celery 5.7.0: the event loop fires them with
`min_delay=1`, and sleeps so long although a timer is due sooner; the timer of the pools without an event loop sleeps a
second where nothing was waiting).

A timer outlives connections: who calls after a moment sees for itself whether what it is about is still there.
Safe for threads.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Alarm:
    """One call that waits for its moment."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call any more."""
        self._call = None

    def ring(self) -> None:
        """Call, once, unless it was cancelled."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Timer:
    """Calls functions after some seconds.

    Args:
        post: Runs a call where it belongs; called by the timer's thread.
        clock: Seconds of a clock that only goes forward.
    """

    def __init__(
        self, post: Callable[[Callable[[], None]], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._post = post
        self._clock = clock
        self._alarms: list[tuple[float, int, Alarm]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def call_after(self, seconds: float, call: Callable[[], None]) -> Alarm:
        """Call after some seconds; calls of the same moment are called in the order in which they were asked for."""
        alarm = Alarm(call)
        with self._changed:
            if self._stopped:
                return alarm
            due_at = self._clock() + max(0.0, seconds)
            heapq.heappush(self._alarms, (due_at, next(self._numbers), alarm))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shards-timer", daemon=True)
                self._thread.start()
            elif self._alarms[0][2] is alarm:
                self._changed.notify()
        return alarm

    def stop(self) -> None:
        """Call nothing any more."""
        with self._changed:
            self._stopped = True
            self._alarms.clear()
            self._changed.notify()

    def take_due(self) -> list[Alarm]:
        """Take what is due now, in order."""
        with self._changed:
            return self._take_due()

    def _take_due(self) -> list[Alarm]:
        now, due = self._clock(), []
        while self._alarms and self._alarms[0][0] <= now:
            due.append(heapq.heappop(self._alarms)[2])
        return due

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and not (due := self._take_due()):
                    self._changed.wait(self._alarms[0][0] - self._clock() if self._alarms else None)
                if self._stopped:
                    return
            for alarm in due:
                try:
                    self._post(alarm.ring)
                except Exception:
                    # Without an event loop the call itself is made here; the others must be made, too.
                    logger.exception("a call of a timer failed")
