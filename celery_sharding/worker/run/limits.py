"""Rate limits of tasks: of the heads that wait for one task's bucket, one begins each time the bucket lets one through.

    begins ──the bucket is empty, or others wait──▶ waits in the bucket's queue, held in its lane
      ▲                                                  │ its turn: one at the bucket's rate, the first first
      └──────────────────────────────────────────────────┘ and again at the head of the queue if the bucket is empty

The bucket is asked when a run begins, so the limit holds whatever waited in between; the queue only sees to it that
somebody asks at the right moment, and that those who wait do not all ask at once, where one gets it and the others are
late. A limit that is changed while the worker runs (`rate_limit` of remote control) makes new buckets: who waits for an
old one asks the new.

Safe for threads.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import Any

from celery_sharding.worker.ports import Clock, Pool
from celery_sharding.worker.run.delivery import GONE, Entry, State
from celery_sharding.worker.run.lanes import Lanes

# How soon it is seen that a limit was changed.
_LOOK_SECONDS = 1.0
# A bucket counts in fractions: it may lack a last one for no time at all.
_LEAST_SECONDS = 0.001


class _Line:
    """Who waits for one bucket."""

    __slots__ = ("bucket", "called", "entries", "has_alarm")

    def __init__(self, bucket: Any) -> None:
        self.bucket = bucket
        self.entries: deque[Entry] = deque()
        self.called: set[Entry] = set()  # whose turn it was, and who have not asked yet
        self.has_alarm = False


class Limits:
    """The rate limits of one worker's sharded runs."""

    def __init__(self, lanes: Lanes[Any], pool: Pool, clock: Clock) -> None:
        self._lanes = lanes
        self._pool = pool
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}

    def pass_or_hold(self, entry: Entry) -> bool:
        """Say whether an entry that was started may begin now; if not, it is held until it may."""
        task = entry.request.task.name
        bucket = self._pool.bucket_for(task)
        if bucket is None and task not in self._lines:
            return True
        with self._lock:
            line = self._line(task, bucket)
            was_called = line is not None and entry in line.called
            if line is None or ((was_called or not line.entries) and bucket.can_consume(1)):
                if line is not None:
                    line.called.discard(entry)
                return True
        # Outside the lock: it may start another entry, which comes here.
        if not self._lanes.hold(entry):
            return False
        with self._lock:
            line.called.discard(entry)
            if was_called:
                line.entries.appendleft(entry)
            else:
                line.entries.append(entry)
            self._set_alarm(task, line, bucket.expected_time(1))
        return False

    def _line(self, task: str, bucket: Any) -> _Line | None:
        """Return the line of a task's bucket; one of an old bucket is called as a whole by its alarm."""
        line = self._lines.get(task)
        if bucket is None:
            return None
        if line is None or line.bucket is not bucket:
            line = self._lines[task] = _Line(bucket)
        return line

    def _set_alarm(self, task: str, line: _Line, seconds: float) -> None:
        if not line.has_alarm:
            line.has_alarm = True
            self._clock.call_after(
                min(max(seconds, _LEAST_SECONDS), _LOOK_SECONDS), partial(self._call_next, task, line)
            )

    def _call_next(self, task: str, line: _Line) -> None:
        bucket = self._pool.bucket_for(task)
        with self._lock:
            line.has_alarm = False
            line.called = {entry for entry in line.called if entry.state not in GONE}
            if bucket is not line.bucket:
                due = [*line.entries]
                line.entries.clear()
                if bucket is None and self._lines.get(task) is line:
                    del self._lines[task]
            else:
                due = self._take_next(line)
                if line.entries:
                    wait_seconds = 1 / bucket.fill_rate if due else bucket.expected_time(1)
                    self._set_alarm(task, line, wait_seconds)
        for entry in due:
            self._lanes.due(entry)

    def _take_next(self, line: _Line) -> list[Entry]:
        """Take the first that still waits, if the bucket lets one through."""
        while line.entries and line.entries[0].state is not State.HELD:
            line.entries.popleft()
        if not line.entries or line.bucket.expected_time(1) > 0:
            return []
        entry = line.entries.popleft()
        line.called.add(entry)
        return [entry]
