"""Claims in the memory of this process: for tests, eager mode, and workers of one process.

Other processes do not see these claims, so `stores.check_tasks` refuses this store to a worker that has child
processes. Nothing survives a restart.
"""

from __future__ import annotations

import threading
import time

from celery_sharding.dedup import claims
from celery_sharding.dedup.claims import Claimed, Clock, Outcome, Record, Shown
from celery_sharding.dedup.owners import Owner

_SWEEP_EVERY = 1_000


class MemoryStore:
    """A `Store` of one process. `clock` returns seconds and may be a fake one."""

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        self._claims_since_sweep = 0

    def claim(
        self, key: str, *, owner: Owner, lease_seconds: float, ttl_seconds: float, evict: str | None = None
    ) -> Outcome:
        with self._lock:
            now = self._clock()
            self._sweep(now)
            record = self._records.get(key)
            obstacle = claims.decide(record, owner=owner, evict=evict, now=now)
            if obstacle is not None:
                return obstacle
            record = self._records[key] = claims.claimed(
                record, owner=owner, lease_seconds=lease_seconds, ttl_seconds=ttl_seconds, now=now
            )
            return Claimed(owner.run_id, record.fencing)

    def renew(self, key: str, token: str, *, lease_seconds: float) -> bool:
        return self._hold(key, token, state=claims.RUNNING, lease_seconds=lease_seconds)

    def park(self, key: str, token: str, *, lease_seconds: float) -> bool:
        return self._hold(key, token, state=claims.PARKED, lease_seconds=lease_seconds)

    def commit(self, key: str, token: str, *, result: bytes, ttl_seconds: float) -> bool:
        with self._lock:
            record = self._records.get(key)
            if record is None or record.token != token or record.state not in (claims.RUNNING, claims.DONE):
                return False
            if record.state == claims.RUNNING:
                self._records[key] = claims.committed(record, result=result, ttl_seconds=ttl_seconds, now=self._clock())
            return True

    def release(self, key: str, token: str) -> bool:
        with self._lock:
            record = self._records.get(key)
            if record is None or record.token != token or record.state not in (claims.RUNNING, claims.PARKED):
                return False
            self._records[key] = claims.released(record)
            return True

    def show(self, key: str) -> Shown | None:
        with self._lock:
            now = self._clock()
            record = self._records.get(key)
            return None if record is None or record.expires_at <= now else claims.shown(key, record, now=now)

    def forget(self, key: str, *, force: bool) -> bool:
        with self._lock:
            record = self._records.get(key)
            if record is None:
                return True
            if not force and claims.is_held(record, now=self._clock()):
                return False
            self._records[key] = claims.forgotten(record)
            return True

    def _hold(self, key: str, token: str, *, state: str, lease_seconds: float) -> bool:
        with self._lock:
            record = self._records.get(key)
            if record is None or record.token != token or record.state != claims.RUNNING:
                return False
            self._records[key] = claims.held(record, state=state, lease_seconds=lease_seconds, now=self._clock())
            return True

    def _sweep(self, now: float) -> None:
        self._claims_since_sweep += 1
        if self._claims_since_sweep >= _SWEEP_EVERY:
            self._claims_since_sweep = 0
            for key in [key for key, record in self._records.items() if record.expires_at <= now]:
                del self._records[key]
