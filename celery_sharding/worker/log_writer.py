"""Confirmed writes of a worker to its groups' logs and queues, beside the event loop.

A worker writes attempts, drained facts, vitals, seals and dead letters. It must not publish inside a message handler:
py-amqp reads the socket before it writes, so it would handle another message in the middle of the first. So one thread
publishes what it is given, in order and in batches (`log_batches`), and reports each confirm through `calls.post`,
which runs the callback where lanes may be moved.

A pool that runs tasks in the main thread has no loop that another thread could wake. There `InlineLogWriter` publishes
at once, in the caller, under a lock. Optional writes do not make the caller wait: they go along with the next write
that must be confirmed, or with the first optional one a fifth of a second later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import AbstractContextManager

from celery_sharding.rabbitmq.connect import Broker
from celery_sharding.worker.log import Log, Poster, Write
from celery_sharding.worker.log_batches import BATCH_WRITES_MAX, CONFIRM_SECONDS, BatchWriter

logger = logging.getLogger(__name__)

_STOP_SECONDS = 2.0
_OPTIONAL_WAIT_SECONDS = 0.2


class LogWriter(Log):
    """Publishes to queues by name, confirmed, from a thread of its own."""

    def __init__(self, broker: Broker, calls: Poster) -> None:
        self._batches = BatchWriter(broker, calls)
        self._waiting: deque[Write] = deque()
        self._wake = threading.Condition()
        self._busy = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    def write(self, writes: list[Write]) -> None:
        with self._wake:
            self._waiting.extend(writes)
            self._wake.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shards-log-writer", daemon=True)
                self._thread.start()

    def flush(self, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        with self._wake:
            while self._waiting or self._busy:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._wake.wait(min(remaining, 0.1))
        return True

    def stop(self) -> None:
        self.flush(_STOP_SECONDS)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        self._batches.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                self._busy = True
            try:
                self._batches.write_from(self._waiting)
            except Exception:
                logger.exception("writing to the shards' logs failed")
                self._batches.close()
            finally:
                with self._wake:
                    self._busy = False
                    self._wake.notify_all()


class InlineLogWriter(Log):
    """Publishes while the caller waits, within `within`."""

    def __init__(self, broker: Broker, calls: Poster, within: AbstractContextManager[None]) -> None:
        self._batches = BatchWriter(broker, calls)
        self._within = within
        self._waiting: deque[Write] = deque()
        self._lock = threading.RLock()
        self._written_at = 0.0

    def write(self, writes: list[Write]) -> None:
        with self._lock:
            self._waiting.extend(writes)
            is_recent = time.monotonic() - self._written_at < _OPTIONAL_WAIT_SECONDS
            if all(write.optional for write in writes) and is_recent and len(self._waiting) < BATCH_WRITES_MAX:
                return
        is_awaited = any(write.then is not None and not write.optional for write in writes)
        while not self.flush(CONFIRM_SECONDS) and is_awaited:
            logger.warning("a write to %s is not confirmed yet", writes[0].queue)

    def flush(self, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        with self._within, self._lock:
            while self._waiting and time.monotonic() < deadline:
                self._written_at = time.monotonic()
                self._batches.write_from(self._waiting)
        return not self._waiting

    def stop(self) -> None:
        self.flush(_STOP_SECONDS)
        self._batches.close()
