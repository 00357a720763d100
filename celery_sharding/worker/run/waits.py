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
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
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


class _Outage:
    """The claim store does not answer.

    Attributes:
        since: In seconds since the epoch.
        asking: The run that tries whether it answers again; it may take until `asks_until`, and then another tries.
        next_try: When the next run may try, by the monotonic clock.
        planned: When a timer lets one try.
        said_at: When the last outage that was logged was logged last.
    """

    __slots__ = ("asking", "asks_until", "began", "error", "next_try", "planned", "said_at", "since", "tries")

    def __init__(self, now: float, *, said_at: float) -> None:
        self.since = time.time()
        self.began = now
        self.error = ""
        self.tries = 0
        self.next_try = now + STORE_SECONDS_MIN
        self.planned = 0.0
        self.asking: Entry | None = None
        self.asks_until = 0.0
        self.said_at = said_at

    def let_ask(self, entry: Entry, now: float) -> bool:
        """Let a run try whether the store answers, if it is time for that and no other is about it."""
        if now < self.next_try or (self.asking is not None and now < self.asks_until):
            return False
        self.asking = entry
        self.asks_until = now + min(_PATIENCE_SECONDS * 2 ** min(self.tries, 10), _PATIENCE_SECONDS_MAX)
        self.next_try = self.asks_until
        self.tries += 1
        return True

    def note_silence(self, entry: Entry, error: str, now: float) -> None:
        """The store did not answer a run, which may be the one that was to ask."""
        self.error = error
        if entry is self.asking:
            self.asking = None
            self.next_try = now + min(STORE_SECONDS_MIN * 2 ** min(self.tries, 16), STORE_SECONDS_MAX)
            self.planned = 0.0

    def say(self, now: float, *, messages: int) -> None:
        """Log it, once a minute."""
        if now - self.said_at < _SAY_EVERY_SECONDS:
            return
        self.said_at = now
        logger.warning(
            "the claim store has not answered for %.0f s: %d messages wait in their lanes, and nothing behind "
            "them starts (%s)",
            now - self.began,
            messages,
            self.error,
        )


class Waits:
    """What waits in the lanes of one worker.

    Attributes:
        outage: Of the claim store; None: it answers, as far as is known.
    """

    def __init__(self, lanes: Lanes[Any], clock: Clock) -> None:
        self._lanes = lanes
        self._clock = clock
        self._lock = threading.Lock()
        self._for_claims: dict[Entry, int] = {}  # to how often it has looked
        self._for_store: dict[Entry, None] = {}
        self.outage: _Outage | None = None
        self._said_at = float("-inf")

    def pass_or_hold(self, entry: Entry) -> bool:
        """Say whether a run may go into the pool; while the store is away, all but the one that asks are held here."""
        if self.outage is None or not waits_for_store(entry.request.task):
            return True
        with self._lock:
            outage = self.outage
            if outage is None or entry is outage.asking:
                return True  # the one that asks may have been held on its way, by a rate limit for one
            now = time.monotonic()
            if outage.let_ask(entry, now):
                entry.request.request_dict[ASKS_STORE] = True
                self._plan(outage, now)
                return True
        if self._lanes.hold(entry, is_resting=True):
            self._keep(entry)
        return False

    def hold_for(self, entry: Entry, seconds: float) -> None:
        """Keep an entry that was started in its place for some seconds, and start it again then."""
        if self._lanes.hold(entry):
            self._clock.call_after(seconds, partial(self._lanes.due, entry))

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
        self._clock.call_after(seconds, partial(self._lanes.due, entry))

    def answers(self) -> None:
        """The store has answered: all that waits for it goes on."""
        with self._lock:
            outage, self.outage = self.outage, None
            if outage is None:
                return
            entries, self._for_store = list(self._for_store), {}
            self._said_at = outage.said_at
        if outage.said_at >= outage.began:
            seconds = time.monotonic() - outage.began
            logger.warning("the claim store answers again after %.1f s; %d messages go on", seconds, len(entries))
        for entry in entries:
            self._lanes.due(entry)

    def forget(self, entry: Entry) -> None:
        """Forget an entry that has begun its work, or has left its lane."""
        if not self._for_claims and self.outage is None:
            return
        with self._lock:
            self._for_claims.pop(entry, None)
            self._for_store.pop(entry, None)
            outage = self.outage
            if outage is None or outage.asking is not entry:
                return
            # It ended without having asked, revoked for one; the next one asks.
            outage.asking, outage.next_try = None, 0.0
            outage.planned = 0.0
            self._plan(outage, time.monotonic())

    def of(self, source: Hashable) -> Waiting:
        """Return what of a shard waits."""
        with self._lock:
            store = sum(entry.shard == source for entry in self._for_store)
            claims = sum(entry.shard == source for entry in self._for_claims)
            outage = self.outage
            if outage is None:
                return Waiting(store, claims, None)
            store += outage.asking is not None and outage.asking.shard == source
            return Waiting(store, claims, outage.since if store else None)

    def _keep(self, entry: Entry) -> None:
        """Keep an entry that is held already until the store answers, or it is to try."""
        with self._lock:
            outage = self.outage
            if outage is not None:
                self._for_store[entry] = None
                self._plan(outage, time.monotonic())
        if outage is None:
            self._lanes.due(entry)

    def _wait_for_store(self, entry: Entry, reason: str) -> None:
        with self._lock:
            now = time.monotonic()
            outage = self._begin_outage(now)
            outage.note_silence(entry, reason, now)
            self._for_store[entry] = None
            self._plan(outage, now)
            outage.say(now, messages=len(self._for_store))

    def _begin_outage(self, now: float) -> _Outage:
        self.outage = self.outage or _Outage(now, said_at=self._said_at)
        return self.outage

    def _plan(self, outage: _Outage, now: float) -> None:
        # A timer is lost with the connection, so one whose time is over is planned anew.
        if now < outage.planned:
            return
        outage.planned = max(now, outage.next_try) + 0.001
        self._clock.call_after(outage.planned - now, self._try_again)

    def _try_again(self) -> None:
        """Let one message of each shard try: that of a frozen one would not start."""
        with self._lock:
            if self.outage is None:
                return
            self._for_store = {entry: None for entry in self._for_store if entry.state is State.HELD}
            first = list({entry.shard: entry for entry in reversed(self._for_store)}.values())
            for entry in first:
                del self._for_store[entry]
        for entry in first:
            self._lanes.due(entry)
