"""What the owner of a shard counts since it took it: for the vitals, and for the journal when it gives the shard up."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

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

    def to_facts(self, *, with_times: bool) -> dict[str, Any]:
        """Return what was counted, as the journal has it.

        Args:
            with_times: Waits and runs, too, if there were any.
        """
        facts: dict[str, Any] = {"since": self._taken_at, "counters": dict(self._counters)}
        if with_times:
            for name, times in (("waits", self._waits.to_list()), ("runs", self._runs.to_list())):
                if times:
                    facts[name] = times
        return facts
