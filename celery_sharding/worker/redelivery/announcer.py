"""Runs that are announced before they begin: the attempt is in the stream, confirmed, before the task's body may run.

How a record changes is drawn in `run.delivery`; here it is changed, and written.

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

from celery_sharding.journal.events import RunAnnounced, RunWithdrawn
from celery_sharding.worker.log import Log, Record
from celery_sharding.worker.ports import Source
from celery_sharding.worker.redelivery.policy import history_of, known_attempts, may_be_announced_ahead
from celery_sharding.worker.run.delivery import Delivery, Phase, State
from celery_sharding.worker.run.lanes import Lanes

AHEAD_SECONDS = 0.5
AHEAD_MAX = 500
_NOT_STARTED = (State.WAITING, State.READY)


class Announcer:
    """What one worker has announced, and what of it has not begun."""

    def __init__(self, log: Log, lanes: Lanes[Delivery]) -> None:
        self._log = log
        self._lanes = lanes
        self._lock = threading.Lock()
        self._expected: dict[Source, deque[Delivery]] = {}  # redelivered, in the order of admission
        self._ahead: set[Delivery] = set()  # announced ahead of their slots, and not begun
        self._begun_at: deque[float] = deque(maxlen=AHEAD_MAX)  # of redelivered messages

    def expect(self, delivery: Delivery) -> None:
        """Take note of a redelivered message whose run is to be announced."""
        with self._lock:
            self._expected.setdefault(delivery.shard, deque()).append(delivery)

    def record(self, delivery: Delivery, begun: int, then: Callable[[], None]) -> None:
        """Announce a run of a message that was begun `begun` times, and call `then` when that is recorded.

        One that was announced ahead of its slot is not announced again.
        """
        record = delivery.ensure_record()
        with self._lock:
            write = None if delivery in self._ahead else self._announce(delivery, begun)
            is_confirmed = record.phase is Phase.CONFIRMED
            record.on_confirmed = None if is_confirmed else then
        if write is not None:
            self._log.append_all([write])
        elif is_confirmed:
            then()

    def announce_next(self) -> None:
        """Announce what is about to begin, if half of what was announced ahead has begun."""
        shards = [shard for shard in list(self._expected) if shard.catch_up()]
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
        """Take note that a run begins."""
        record = delivery.ensure_record()
        with self._lock:
            if record.is_announced:
                self._ahead.discard(delivery)
                self._begun_at.append(time.monotonic())
            record.begin()

    def take_back(self, delivery: Delivery) -> None:
        """Take the record of a run back that was about to begin, and waits now: its next try is recorded anew."""
        with self._lock:
            if delivery.record is None or not delivery.record.take_back():
                return
            event = RunWithdrawn(delivery.message_id, delivery.attempts).as_dict()
        self._log.append(delivery.place.names.attempts, event)

    def withdraw(self, delivery: Delivery) -> None:
        """Take the announcement of a run back that has not begun: it says nothing against the message."""
        with self._lock:
            self._ahead.discard(delivery)
            if delivery.record is None or not delivery.record.withdraw():
                return
            event = RunWithdrawn(delivery.message_id, delivery.attempts).as_dict()
        # Not optional: the announcement itself is sent again until it is stored, also after an outage.
        self._log.append(delivery.place.names.attempts, event)

    def forget(self, shard: Source) -> None:
        """Expect nothing more of a shard that was given up or lost."""
        with self._lock:
            self._expected.pop(shard, None)
            self._ahead = {delivery for delivery in self._ahead if delivery.shard is not shard}

    def _announce_of(self, shard: Source) -> Record | None:
        """Announce the next message of a shard that may be announced ahead."""
        queue = self._expected.get(shard)
        while queue:
            delivery = queue.popleft()
            is_judged = delivery.record is not None and delivery.record.is_judged
            # Of several that are not named and the same, only the one whose turn it is may be recorded.
            if delivery.state in _NOT_STARTED and not is_judged and delivery.is_named:
                history = history_of(delivery, known_attempts(delivery), now=time.time())
                if may_be_announced_ahead(history):
                    self._ahead.add(delivery)
                    return self._announce(delivery, history.begun)
        self._expected.pop(shard, None)
        return None

    def _announce(self, delivery: Delivery, begun: int) -> Record:
        delivery.ensure_record().announce(begun)
        event = RunAnnounced(delivery.message_id, delivery.attempts).as_dict()
        return delivery.place.names.attempts, event, partial(self._note_confirmed, delivery)

    def _note_confirmed(self, delivery: Delivery) -> None:
        with self._lock:
            then = delivery.ensure_record().confirm()
        if then is not None:
            then()
