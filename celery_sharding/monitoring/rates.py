"""How fast messages enter and leave a shard, from what its owner counted and what waits in its queue.

What leaves is what the owner was delivered and no longer holds. What enters is what it was delivered, plus the change
of the queue's backlog, which only the broker counts. A single snapshot knows the backlog now, but not before. Then the
rate is the mean since the newest message that the owner had at the time was published, since a queue is in order.

Only vitals of one worker from one time of ownership are compared, by its own clock. So a handover, a restart or a wrong
clock makes a rate unknown, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from celery_sharding.journal.events import ShardVitals

# Vitals come once a second: over less time, one message more or less would count for too much.
_LEAST_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Flow:
    """Messages a second that enter and that leave; None: not known."""

    in_rate: float | None = None
    out_rate: float | None = None

    def clear_seconds(self, waiting: int) -> float | None:
        """Return how long `waiting` messages take to clear; None if that is not known, or they do not get fewer."""
        if self.in_rate is None or self.out_rate is None:
            return None
        if not waiting:
            return 0.0
        shrinks = self.out_rate - self.in_rate
        return waiting / shrinks if shrinks > 0 else None


def measure_flow(
    owner: ShardVitals, before: ShardVitals | None, *, ready: int, counted: Sequence[tuple[float, int]] = ()
) -> Flow:
    """Return the flow through a shard.

    Args:
        owner: Its owner's last vitals.
        before: Earlier ones of the same ownership, some seconds ago; None: there are none.
        ready: What waits in its queue now.
        counted: What waited there earlier, as (seconds ago, messages), oldest first; empty for a single snapshot.
    """
    seconds = 0.0 if before is None else owner.at - before.at
    if before is None or seconds < _LEAST_SECONDS:
        return Flow()
    delivered = owner.delivered - before.delivered
    out_rate = max(0.0, (delivered - owner.held + before.held) / seconds)
    then = next(((ago, count) for ago, count in counted if _LEAST_SECONDS <= ago <= seconds + 1), None)
    if then is not None:
        return Flow(max(0.0, delivered / seconds + (ready - then[1]) / then[0]), out_rate)
    # An owner that had room for much more held all that waited.
    behind_seconds = 0.0 if before.has_room else before.behind_seconds
    return Flow(None if behind_seconds is None else (delivered + ready) / (seconds + behind_seconds), out_rate)
