"""What the owner of a shard counts since it took it: for the vitals, and for the journal when it gives the shard up."""

from __future__ import annotations

import time
from collections import Counter

from celery_sharding.journal.events import Counted
from celery_sharding.journal.histogram import Histogram


class Tally:
    """Counters and times of one shard.

    Attributes:
        newest_sent_at: When the newest message that was delivered was published, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self.newest_sent_at: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin to count: the shard was taken."""
        self._taken_at = time.time()
        self._counters: Counter[str] = Counter()
        self._waits = Histogram()
        self._runs = Histogram()

    def count(self, what: str) -> None:
        self._counters[what] += 1

    def note_wait(self, seconds: float) -> None:
        """A message runs for the first time, so long after it was published."""
        self._waits.note(seconds)

    def note_run(self, seconds: float) -> None:
        """A run has ended that took so long."""
        self._runs.note(seconds)

    def to_counted(self, *, with_times: bool) -> Counted:
        """Return what was counted, waits and runs, too, if asked for."""
        waits, runs = (self._waits.to_list(), self._runs.to_list()) if with_times else ((), ())
        return Counted(self._taken_at, dict(self._counters), waits, runs)
