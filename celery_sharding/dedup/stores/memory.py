"""Claims in the memory of this process: for tests, eager mode, and workers of one process.

Other processes do not see these claims, so `stores.check_tasks` refuses this store in a worker with child processes.
Nothing survives a restart.
"""

from __future__ import annotations

import threading
import time

from celery_sharding.dedup.claims import Record, StoreClock
from celery_sharding.dedup.stores.stepping import Step, SteppingStore, T

_SWEEP_EVERY = 1_000


class MemoryStore(SteppingStore):
    """A `ClaimStore` of one process. `clock` returns seconds and may be a fake one."""

    is_of_one_process = True

    def __init__(self, clock: StoreClock = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        self._steps_since_sweep = 0

    def change(self, key: str, step: Step[T]) -> T:
        with self._lock:
            now = self._clock()
            self._sweep(now)
            record, answer = step(self._records.get(key), now)
            if record is not None:
                self._records[key] = record
            return answer

    def discard(self, key: str) -> None:
        with self._lock:
            self._records.pop(key, None)

    def _sweep(self, now: float) -> None:
        self._steps_since_sweep += 1
        if self._steps_since_sweep >= _SWEEP_EVERY:
            self._steps_since_sweep = 0
            for key in [key for key, record in self._records.items() if record.expires_at <= now]:
                del self._records[key]
