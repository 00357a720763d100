"""Which of the redelivered messages of one worker may run side by side.

A message that is redelivered may have killed its last worker, or only have run beside the one that did: nobody can tell
from outside. So that no innocent dies for a poison, a message that has one run left makes it without other suspects
beside it. If it kills the worker, it dies alone; if it was innocent, it comes to its end.

    suspect       redelivered; runs beside others
    last chance   begun one time less than allowed, and at least twice; runs when no suspect does, and none starts
                  beside it. Messages that are delivered for the first time always may

Groups that allow two runs or less have no such run: there the second is the last one of every redelivered message, and
all of them would have to run one by one after each restart.
"""

from __future__ import annotations

import threading
from collections import deque

from celery_sharding.worker.run.lanes import Entry, State

_IN_POOL = (State.RUNNING, State.ORPHAN)
_ON_ITS_WAY = (State.HELD, State.READY, State.RUNNING)


class Suspects:
    """The suspects of one worker. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Entry, bool] = {}  # to whether it is its last chance; those let in are counted from then on
        self._let_in: set[Entry] = set()
        self._waiting: deque[tuple[Entry, bool]] = deque()

    def begin(self, entry: Entry, *, is_last_chance: bool) -> bool:
        """Let a suspect that is in the pool begin, if it may; else it is to `wait`."""
        with self._lock:
            self._forget_ended()
            if entry in self._let_in:
                self._let_in.discard(entry)
            elif self._has_last_chance() or (is_last_chance and self._running):
                return False
            self._running[entry] = is_last_chance
            return True

    def wait(self, entry: Entry, *, is_last_chance: bool) -> None:
        """Keep a suspect, which is held now, until `take_ready` returns it."""
        with self._lock:
            self._waiting.append((entry, is_last_chance))

    def take_ready(self) -> list[Entry]:
        """Let those in that may begin now, in the order in which they came, and return them."""
        if not self._waiting:
            return []
        ready: list[Entry] = []
        with self._lock:
            self._forget_ended()
            while self._waiting and not any(self._running.values()):
                entry, is_last_chance = self._waiting[0]
                if is_last_chance and self._running:
                    break
                self._waiting.popleft()
                self._running[entry] = is_last_chance
                self._let_in.add(entry)
                ready.append(entry)
        return ready

    def _has_last_chance(self) -> bool:
        return any(self._running.values()) or any(is_last for _, is_last in self._waiting)

    def _forget_ended(self) -> None:
        self._let_in = {entry for entry in self._let_in if entry.state in _ON_ITS_WAY}
        self._running = {
            entry: is_last
            for entry, is_last in self._running.items()
            if entry.state in _IN_POOL or entry in self._let_in
        }
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0].state is State.HELD)
