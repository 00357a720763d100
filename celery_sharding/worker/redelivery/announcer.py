"""Runs that are announced before they begin: the attempt is in the stream, confirmed, before the task's body may run.

    not announced ──record, announce_next──▶ on its way ──▶ confirmed ──begun──▶ begins; it counts as an attempt
          ▲                                       │             │
          └──────────────withdraw─────────────────┴─────────────┘ its shard is given up

A confirm takes some milliseconds, and many of them where the broker is far or writes to several nodes. So the runs of a
redelivered backlog are announced several at a time, ahead of the pool's slots: as many as began in the last half
second, which are about to begin. What was announced counts as begun if the worker is killed then, since nobody can tell
any more. So the last run that a message has is never announced ahead of its slot: no message becomes a dead letter for
a run that did not begin, but for one that was just about to when its worker was killed. Groups that allow two runs or
less have nothing to announce ahead after a kill.

Safe for threads; what `record` and `announce_next` write is confirmed where lanes may be moved.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from celery_sharding.journal.attempts import Attempt
from celery_sharding.journal.events import RunAnnounced, RunWithdrawn
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.run.lanes import Entry, Lanes, State

if TYPE_CHECKING:
    from celery_sharding.worker.log import Log, Record
    from celery_sharding.worker.shard.shard import Shard

AHEAD_SECONDS = 0.5
AHEAD_MAX = 500
_NOT_STARTED = (State.WAITING, State.READY)


class Announcements:
    """What one worker has announced, and what of it has not begun."""

    def __init__(self, log: Log, lanes: Lanes) -> None:
        self._log = log
        self._lanes = lanes
        self._lock = threading.Lock()
        self._expected: dict[Shard, deque[Entry]] = {}  # redelivered, in the order of admission
        self._ahead: set[Delivery] = set()  # announced ahead of their slots, and not begun
        self._begun_at: deque[float] = deque(maxlen=AHEAD_MAX)  # of redelivered messages

    def expect(self, entry: Entry) -> None:
        """Take note of a redelivered message whose run is to be announced."""
        delivery: Delivery = entry.item.delivery
        with self._lock:
            self._expected.setdefault(delivery.shard, deque()).append(entry)

    def record(self, delivery: Delivery, begun: int, then: Callable[[], None]) -> None:
        """Announce a run of a message that was begun `begun` times, and call `then` when that is recorded.

        One that was announced ahead of its slot is not announced again.
        """
        with self._lock:
            write = None if delivery in self._ahead else self._announce(delivery, begun)
            is_confirmed = delivery.is_confirmed
            delivery.on_confirmed = None if is_confirmed else then
        if write is not None:
            self._log.append_all([write])
        elif is_confirmed:
            then()

    def announce_next(self) -> None:
        """Announce what is about to begin, if half of what was announced ahead has begun."""
        shards = [shard for shard in list(self._expected) if shard.knows_attempts()]
        if not shards:
            return
        with self._lock:
            since = time.monotonic() - AHEAD_SECONDS
            while self._begun_at and self._begun_at[0] < since:
                self._begun_at.popleft()
            for queue in self._expected.values():
                while queue and queue[0].state not in _NOT_STARTED:
                    queue.popleft()
            wanted = len(self._begun_at)
            if 2 * len(self._ahead) > wanted:
                return
            # A frozen shard withdraws what it has announced, under this lock, before it is given up.
            turns = deque(shard for shard in shards if not self._lanes.is_frozen(shard))
            writes: list[Record] = []
            while turns and len(self._ahead) < wanted:
                write = self._announce_of(turns[0])
                if write is None:
                    turns.popleft()
                else:
                    writes.append(write)
                    turns.rotate(-1)
        if writes:
            self._log.append_all(writes)

    def begun(self, delivery: Delivery) -> None:
        """Take note that an announced run begins."""
        with self._lock:
            delivery.is_announced = False
            self._ahead.discard(delivery)
            self._begun_at.append(time.monotonic())

    def take_back(self, delivery: Delivery) -> None:
        """Take the record of a run back that was about to begin, and waits now: its next try is recorded anew."""
        with self._lock:
            if not delivery.is_counted or not delivery.attempts:
                return
            delivery.is_counted = delivery.is_judged = False
            delivery.was_taken_back = True
            delivery.attempts -= 1
            event = RunWithdrawn(delivery.message_id, delivery.attempts).as_dict()
        self._log.append(delivery.shard.names.attempts, event)

    def withdraw(self, delivery: Delivery) -> None:
        """Take the announcement of a run back that has not begun: it says nothing against the message."""
        with self._lock:
            self._ahead.discard(delivery)
            if not delivery.is_announced or not delivery.attempts:
                return
            delivery.is_announced = False
            delivery.attempts -= 1
            event = RunWithdrawn(delivery.message_id, delivery.attempts).as_dict()
        # Not optional: the announcement itself is sent again until it is stored, also after an outage.
        self._log.append(delivery.shard.names.attempts, event)

    def forget(self, shard: Shard) -> None:
        """Expect nothing more of a shard that was given up or lost."""
        with self._lock:
            self._expected.pop(shard, None)
            self._ahead = {delivery for delivery in self._ahead if delivery.shard is not shard}

    def _announce_of(self, shard: Shard) -> Record | None:
        """Announce the next message of a shard that may be announced ahead."""
        queue = self._expected.get(shard)
        while queue:
            entry = queue.popleft()
            delivery: Delivery = entry.item.delivery
            # Of several that are not named and the same, only the one whose turn it is may be recorded.
            if entry.state in _NOT_STARTED and not delivery.is_judged and delivery.is_named:
                known = known_attempts(delivery)
                begun = begun_before(known, delivery)
                waits = known is not None and known.left_seconds(time.time()) > 0
                if not waits and begun + 1 < shard.group.max_attempts:
                    self._ahead.add(delivery)
                    return self._announce(delivery, begun)
        self._expected.pop(shard, None)
        return None

    def _announce(self, delivery: Delivery, begun: int) -> Record:
        delivery.attempts = begun + 1
        delivery.is_recorded = delivery.is_announced = True
        delivery.is_confirmed = False
        event = RunAnnounced(delivery.message_id, delivery.attempts).as_dict()
        return delivery.shard.names.attempts, event, partial(self._note_confirmed, delivery)

    def _note_confirmed(self, delivery: Delivery) -> None:
        with self._lock:
            delivery.is_confirmed = True
            then, delivery.on_confirmed = delivery.on_confirmed, None
        if then is not None:
            then()


def known_attempts(delivery: Delivery) -> Attempt | None:
    """Return what earlier owners have recorded of a redelivered message, None if nothing is known."""
    return None if delivery.is_repeat else delivery.shard.attempts.get(delivery.message_id)


def begun_before(known: Attempt | None, delivery: Delivery) -> int:
    """Return how often a redelivered message was begun before, as far as is known; an announced run not counted.

    One that nobody recorded may have begun once or only waited in its last owner's lanes; only recorded attempts can
    make it a dead letter.
    """
    if delivery.is_announced:
        return (delivery.attempts or 1) - 1
    if delivery.was_taken_back:
        return delivery.attempts or 0  # what was recorded may not have been read yet
    return known.attempts if known else min(1, delivery.shard.group.max_attempts - 1)
