"""Times counted in buckets: by workers, in the journal's vitals, and in metrics.

The bounds are part of the journal's format. Workers of two versions may write at the same time, so
other bounds need other field names.
"""

from __future__ import annotations

from bisect import bisect_left

# From a task that hardly does anything to a backlog of a day. A time on a bound belongs to the bucket below it.
BOUNDS_SECONDS = (0.005, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0, 3_600.0)


class Histogram:
    """Counts of times by bucket, and their sum.

    `counts` has one more item than there are bounds, for what is longer than the last. `note` may be called from any
    thread; two calls at the same moment may at worst lose one count.
    """

    __slots__ = ("counts", "sum_seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self.sum_seconds = 0.0

    def note(self, seconds: float) -> None:
        """Count one time; a negative one, as clocks that differ produce, counts as 0."""
        seconds = max(0.0, seconds)
        self.counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds

    def to_list(self) -> list[float]:
        """Return the sum in seconds, then the counts without trailing zeros; [] if nothing was noted."""
        counts = list(self.counts)
        while counts and not counts[-1]:
            counts.pop()
        return [round(self.sum_seconds, 3), *counts] if counts else []
