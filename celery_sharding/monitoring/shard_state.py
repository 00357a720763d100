"""The state, lag and rates of one queue, from what is known of it; no broker.

States of a shard, the first that fits:

    waiting      an earlier segment of the chain is not drained yet: nobody consumes it, on purpose
    missing      its queue is gone, or its node is down
    paused       an operator paused it, or the group: no task of it starts until it is resumed
    stuck        its last owner is silent but still connected: it hangs, is stopped, or runs a long task in a solo pool
    unowned      no worker reports that it owns it
    draining     a queue of an earlier segment, consumed to its end
    no standby   its owner is its only consumer
    idle         nothing to do
    ok

`STATES` says what each means, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from celery_sharding.journal.events import ShardVitals
from celery_sharding.monitoring.rates import Flow, measure_flow

# By then the broker has noticed that a lost owner is gone, and counts what it held as ready again.
_RETURNED_SECONDS = 90.0

# State → (what it means, what to do, "" for nothing).
STATES = {
    "ok": ("its owner consumes it, and a standby is ready", ""),
    "idle": ("nothing to do, and a standby is ready", ""),
    "no standby": (
        "its owner is its only consumer",
        "start one more worker for this group, so that a lost one is replaced within seconds",
    ),
    "paused": ("an operator paused it: messages wait in order", "`celery shards resume` resumes it; see `history`"),
    "unowned": (
        "no worker reports that it owns it, so nothing of it runs",
        "start a worker that consumes it; if some run, read their logs; -Q or cancel_consumer may exclude it",
    ),
    "stuck": (
        "its last owner is silent but still connected: it hangs, is stopped, or runs a long task in a solo pool",
        "look at that worker's process; if it does not recover, kill it, and a standby takes over in order",
    ),
    "missing": (
        "its queue is gone, or its broker node is down",
        "check the broker's nodes; if somebody deleted the queue, a worker makes a new generation by itself",
    ),
    "draining": ("a queue of an earlier segment, which is consumed before its successors", ""),
    "waiting": ("an earlier segment is consumed first, to keep the order", "see the rows above it"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one queue.

    Attributes:
        ready: Messages in it that nobody holds; None: it is gone, or out of reach.
        consumers: How many it has, owner and standbys, by the broker's count.
        owner: The last vitals of its owner, `before` some seconds earlier.
        last: The last vitals of any owner, however old.
        counted: What `ready` was earlier, as (seconds ago, messages), oldest first.
    """

    ready: int | None
    consumers: int = 0
    owner: ShardVitals | None = None
    before: ShardVitals | None = None
    last: ShardVitals | None = None
    standbys: tuple[str, ...] = ()
    counted: Sequence[tuple[float, int]] = ()


def derive_state(known: Known, *, live: bool, in_turn: bool, paused: bool) -> str:
    """Return the state of a shard.

    Args:
        live: It is of the live generation.
        in_turn: Its segment is to be consumed now.
    """
    if not in_turn:
        return "waiting"
    if known.ready is None:
        return "missing"
    if paused:
        return "paused"
    if known.owner is None:
        return "stuck" if known.last is not None and known.consumers > len(known.standbys) else "unowned"
    if not live:
        return "draining"
    if not known.standbys:
        return "no standby"
    return "ok" if known.ready or known.owner.held else "idle"


def derive_lag(known: Known, now: float) -> tuple[float | None, bool]:
    """Return the age of the oldest waiting message, None if unknown, and whether it is an estimate."""
    ready, owner, last = known.ready, known.owner, known.last
    if ready is None:
        return None, False
    if owner is not None:
        if owner.lag_seconds is not None or not ready:
            return owner.lag_seconds or 0.0, False
        if not owner.held:
            return 0.0, True  # it has just come and is being delivered
        # All that it holds runs. What waits was published after the newest of those.
        return (None, False) if owner.behind_seconds is None else (owner.behind_seconds, True)
    if last is not None and (ready or (last.held and now - last.at < _RETURNED_SECONDS)):
        return (last.lag_seconds or 0.0) + max(0.0, now - last.at), True
    return (None, False) if ready else (0.0, False)


def derive_flow(known: Known) -> Flow:
    """Return the rates; they are not known without an owner, since what it held is still to be requeued."""
    if known.owner is None or known.ready is None:
        return Flow()
    return measure_flow(known.owner, known.before, ready=known.ready, counted=known.counted)
