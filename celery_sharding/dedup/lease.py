"""Keeping leases alive while tasks run.

One daemon thread per process renews all claims held in it, so a task that computes, blocks or sleeps keeps its lease.
It starts with the first claim and wakes at fixed times, not for each claim, so short tasks cost it nothing.

Every sixth of a lease the thread checks it, and renews it once a third has passed: a task that blocks the whole
interpreter (a C extension that holds the GIL) loses its lease only if it does so for more than half of it. After a fork
the child starts with no claims and its own thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from celery_sharding.dedup.claims import ClaimStore
from celery_sharding.dedup.outage_log import OutageLog
from celery_sharding.errors import StoreUnavailable

logger = logging.getLogger(__name__)
outages = OutageLog(logger)


class Lease:
    """The lease of one claim. `is_lost` turns True when the store says that the claim is another run's."""

    __slots__ = ("_renewed_at", "is_lost", "is_settling", "key", "seconds", "store", "token")

    def __init__(self, store: ClaimStore, key: str, token: str, seconds: float) -> None:
        self.store = store
        self.key = key
        self.token = token
        self.seconds = seconds
        self.is_lost = False
        self.is_settling = False
        self._renewed_at = time.monotonic()

    def is_due(self, now: float) -> bool:
        """Say whether to renew the lease at the monotonic time `now`."""
        return not self.is_settling and not self.is_lost and now - self._renewed_at >= self.seconds / 3

    def renew(self, now: float) -> None:
        """Renew the lease; an unreachable store is logged, and asked again next time."""
        try:
            is_held = self.store.renew(self.key, self.token, lease_seconds=self.seconds)
        except StoreUnavailable as exc:
            outages.warn("renew", "the lease of %s could not be renewed, will try again: %s", self.key, exc)
            return
        if is_held:
            self._renewed_at = now
        elif not self.is_settling:
            self.is_lost = True
            logger.error("the claim of %s lapsed and was taken over while its task ran", self.key)


class Renewal:
    """The leases of one process, and the thread that renews them."""

    def __init__(self) -> None:
        self.forget_all()

    def forget_all(self) -> None:
        """Start with no leases and no thread. For a forked child: those of its parent are not its own."""
        self._leases: dict[str, Lease] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._check_every_seconds = float("inf")

    def add(self, lease: Lease) -> None:
        self._leases[lease.token] = lease
        if self._thread is None or lease.seconds / 6 < self._check_every_seconds:
            self._check_more_often(lease.seconds / 6)

    def remove(self, lease: Lease) -> None:
        self._leases.pop(lease.token, None)

    def renew_due(self, now: float) -> None:
        for lease in list(self._leases.values()):
            if lease.is_due(now):
                try:
                    lease.renew(now)
                except Exception:
                    # One broken record must not stop the thread, which serves all claims of the process.
                    logger.exception("the lease of %s could not be renewed", lease.key)

    def _check_more_often(self, seconds: float) -> None:
        with self._lock:
            self._check_every_seconds = min(seconds, self._check_every_seconds)
            if self._thread is None:
                thread = threading.Thread(target=self._check_for_ever, name="sharding-leases", daemon=True)
                thread.start()  # It may fail; the next claim tries again.
                self._thread = thread
        self._wake.set()

    def _check_for_ever(self) -> None:
        while True:
            self._wake.wait(self._check_every_seconds)
            self._wake.clear()
            self.renew_due(time.monotonic())


renewal = Renewal()
os.register_at_fork(after_in_child=renewal.forget_all)
