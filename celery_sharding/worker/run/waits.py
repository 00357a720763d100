"""Messages that wait at the head of their lanes, without a slot: for the claim store, or for another run's claim.

For the store, one run at a time asks whether it answers again, and the others wait for its word: an outage costs one
slot for as long as that takes, however many lanes wait, and says one line a minute.

    in the pool ──the store does not answer──▶ held ──next try──▶ asks, alone ──it answers──▶ all go on
                                                 ▲                     └──it does not──┐
    head of a lane ──an outage goes on───────────┴─────────────────────────────────────┘  0.1 s, 0.2 s … 5 s later

A run whose claim another holds looks again after 0.05 s, 0.1 s … 1 s, each for itself; a worker with hundreds of them
looks at a hundred a second.

What waits has not begun: it counts as no retry and no attempt, and its shard may be given up as if it were idle. Its
next owner tries anew.

Safe for threads. Lanes are called outside the lock: what they start may come back here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from celery_sharding.dedup.waiting import STORE, WaitInLane, waits_for_store
from celery_sharding.wire import ASKS_STORE
from celery_sharding.worker.ports import Clock
from celery_sharding.worker.run.delivery import Entry, State
from celery_sharding.worker.run.lanes import Lanes

logger = logging.getLogger(__name__)

STORE_SECONDS_MIN, STORE_SECONDS_MAX = 0.1, 5.0
CLAIM_SECONDS_MIN, CLAIM_SECONDS_MAX = 0.05, 1.0
LOOKS_PER_SECOND_MAX = 100.0
# A claim store takes less time to answer, or to be given up, unless its driver waits for ever. Then the next run asks.
_PATIENCE_SECONDS, _PATIENCE_SECONDS_MAX = 15.0, 600.0
_SAY_EVERY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """What of one shard waits, in messages. `store_away_since` is in seconds since the epoch, None if none waits."""

    for_store: int
    for_claims: int
    store_away_since: float | None


class Waits:
    """What waits in the lanes of one worker."""

    def __init__(self, lanes: Lanes[Any], clock: Clock) -> None:
        self._lanes = lanes
        self._clock = clock
        self._lock = threading.Lock()
        self._for_claims: dict[Entry, int] = {}  # to how often it has looked
        self._for_store: dict[Entry, None] = {}
        self._away_since: float | None = None
        self._away_from = 0.0  # the same by the monotonic clock
        self._error = ""
        self._tries = 0
        self._next_try = 0.0
        self._planned = 0.0
        self._asking: Entry | None = None
        self._asks_until = 0.0
        self._said_at = float("-inf")

    def lets_begin(self, entry: Entry) -> bool:
        """Say whether a run may go into the pool; while the store is away, all but the one that asks are held here."""
        if self._away_since is None or not waits_for_store(entry.request.task):
            return True
        with self._lock:
            if self._away_since is None or entry is self._asking:
                return True  # the one that asks may have been held on its way, by a rate limit for one
            now = time.monotonic()
            if now >= self._next_try and (self._asking is None or now >= self._asks_until):
                patience = min(_PATIENCE_SECONDS * 2 ** min(self._tries, 10), _PATIENCE_SECONDS_MAX)
                self._tries += 1
                self._asking, self._asks_until = entry, now + patience
                self._next_try = self._asks_until
                entry.request.request_dict[ASKS_STORE] = True
                self._plan(now)
                return True
        if self._lanes.hold(entry, is_resting=True):
            self._keep(entry)
        return False

    def learn(self, wait: WaitInLane) -> None:
        """Take note of why a run will wait, before it gives its slot to another that would ask in vain, too."""
        if wait.what == STORE:
            with self._lock:
                self._begin_outage(time.monotonic())

    def wait(self, entry: Entry, wait: WaitInLane) -> None:
        """Try a held entry again, when what it waits for may have come."""
        if wait.what == STORE:
            self._wait_for_store(entry, wait.reason)
            return
        with self._lock:
            looks = self._for_claims[entry] = self._for_claims.get(entry, 0) + 1
            longest = max(CLAIM_SECONDS_MAX, len(self._for_claims) / LOOKS_PER_SECOND_MAX)
        seconds = min(CLAIM_SECONDS_MIN * 2 ** min(looks - 1, 16), longest)
        if wait.at_most_seconds is not None:
            seconds = max(CLAIM_SECONDS_MIN, min(seconds, wait.at_most_seconds))
        self._clock.call_after(seconds, lambda: self._lanes.due(entry))

    def answers(self) -> None:
        """The store has answered: all that waits for it goes on."""
        with self._lock:
            if self._away_since is None:
                return
            entries, self._for_store = list(self._for_store), {}
            self._away_since, self._asking, self._tries = None, None, 0
            seconds, was_said = time.monotonic() - self._away_from, self._said_at >= self._away_from
        if was_said:
            logger.warning("the claim store answers again after %.1f s; %d messages go on", seconds, len(entries))
        for entry in entries:
            self._lanes.due(entry)

    def forget(self, entry: Entry) -> None:
        """Forget an entry that has begun its work, or has left its lane."""
        if not self._for_claims and self._away_since is None:
            return
        with self._lock:
            self._for_claims.pop(entry, None)
            self._for_store.pop(entry, None)
            if self._asking is not entry:
                return
            # It ended without having asked, revoked for one; the next one asks.
            self._asking, self._next_try = None, 0.0
            self._planned = 0.0
            self._plan(time.monotonic())

    def of(self, source: Hashable) -> Waiting:
        """Return what of a shard waits."""
        with self._lock:
            store = Counter(entry.shard for entry in self._for_store)
            claims = sum(entry.shard == source for entry in self._for_claims)
            asking = self._asking
            if self._away_since is not None and asking is not None:
                store[asking.shard] += 1
            return Waiting(store[source], claims, self._away_since if store[source] else None)

    def _keep(self, entry: Entry) -> None:
        """Keep an entry that is held already until the store answers, or it is to try."""
        with self._lock:
            is_away = self._away_since is not None
            if is_away:
                self._for_store[entry] = None
                self._plan(time.monotonic())
        if not is_away:
            self._lanes.due(entry)

    def _wait_for_store(self, entry: Entry, reason: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._begin_outage(now)
            if entry is self._asking:
                self._asking = None
                self._next_try = now + min(STORE_SECONDS_MIN * 2 ** min(self._tries, 16), STORE_SECONDS_MAX)
                self._planned = 0.0
            self._error = reason
            self._for_store[entry] = None
            self._plan(now)
            self._say(now)

    def _begin_outage(self, now: float) -> None:
        if self._away_since is None:
            self._away_since, self._away_from, self._tries = time.time(), now, 0
            self._next_try = now + STORE_SECONDS_MIN
            self._planned = 0.0

    def _plan(self, now: float) -> None:
        # A timer is lost with the connection, so one whose time is over is planned anew.
        if now < self._planned:
            return
        self._planned = max(now, self._next_try) + 0.001
        self._clock.call_after(self._planned - now, self._try_again)

    def _try_again(self) -> None:
        """Let one message of each shard try: that of a frozen one would not start."""
        with self._lock:
            if self._away_since is None:
                return
            self._for_store = {entry: None for entry in self._for_store if entry.state is State.HELD}
            first = list({entry.shard: entry for entry in reversed(self._for_store)}.values())
            for entry in first:
                del self._for_store[entry]
        for entry in first:
            self._lanes.due(entry)

    def _say(self, now: float) -> None:
        if now - self._said_at < _SAY_EVERY_SECONDS:
            return
        self._said_at = now
        logger.warning(
            "the claim store has not answered for %.0f s: %d messages wait in their lanes, in order, and no other of "
            "theirs starts (%s)",
            now - self._away_from,
            len(self._for_store),
            self._error,
        )
