"""What the worker's main process says of runs: states, and the hooks and signals of Celery that go with them.

A child stores the result of its own run. But a run whose process was lost or killed, a message that is revoked, has
expired or is a dead letter: of those the main process tells. A result backend that does not answer would block it for
the driver's time-out and all of its tries; no heartbeat would be sent meanwhile, and the broker would give the shards
to another worker while the children run on. So one thread tells, in order, and nothing waits for it but a message of
which nothing else says what became of it.

    told ──▶ queued ──▶ stored ──▶ its callback is posted
                │ ▲
                │ └── an error of the backend: again, some times
                └───▶ given up, or still queued when the worker ends: logged, with what is not stored

The thread begins with the first call, after the pool has forked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Queue, SimpleQueue
from typing import Any

from celery_sharding.celery_hooks.backend_errors import is_of_backend
from celery_sharding.texts import describe
from celery_sharding.worker.log import Poster

logger = logging.getLogger(__name__)

_PAUSES_SECONDS = (0.5, 2.0, 5.0)


@dataclass(slots=True, eq=False)
class _Telling:
    what: str
    call: Callable[[], object]
    then: Callable[[bool], None] | None


class StateWriter:
    """Tells what became of runs, from a thread of its own.

    Args:
        app: Celery's; each thread that asks for its result backend has one of its own.
        is_green: The pool runs greenlets.
    """

    def __init__(self, app: Any, poster: Poster, *, is_green: bool = False) -> None:
        self.app = app
        self._poster = poster
        # Its `put` may be interrupted by a signal's handler that calls it, too: a cold shutdown does. Greenlets need
        # the other: eventlet leaves this one as it is, which would block all of them.
        self._queue: SimpleQueue[_Telling | None] | Queue[_Telling | None] = Queue() if is_green else SimpleQueue()
        self._current: _Telling | None = None
        self._stopping = threading.Event()
        self._starting = threading.RLock()  # runs of a thread pool tell, too, and signal handlers
        self._thread: threading.Thread | None = None

    def tell(self, what: str, call: Callable[[], object], then: Callable[[bool], None] | None = None) -> None:
        """Run `call`, which may block for long; then `then`, where lanes may be moved, with whether it was done.

        Args:
            what: Names it in the log.
        """
        self._queue.put(_Telling(what, call, then))
        if self._thread is not None:
            return
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shards-states", daemon=True)
                self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Tell what is left, for so long; what is not told then is logged."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        if not self._thread.is_alive():
            return
        self._stopping.set()
        current = self._current
        lost = [] if current is None else [current.what]
        while not self._queue.empty():
            telling = self._queue.get()
            if telling is not None:
                lost.append(telling.what)
        logger.error("the result backend did not answer before the worker stopped; not stored: %s", "; ".join(lost))

    def _run(self) -> None:
        while (telling := self._queue.get()) is not None:
            self._current = telling
            is_told = self._tell(telling)
            self._current = None
            if telling.then is not None:
                self._poster.post(partial(_end, telling.what, telling.then, is_told))

    def _tell(self, telling: _Telling) -> bool:
        for pause_seconds in (*_PAUSES_SECONDS, None):
            try:
                telling.call()
            except BaseException as exc:  # hooks and receivers are called, which may raise anything
                if pause_seconds is None or self._stopping.is_set() or not is_of_backend(exc.__traceback__):
                    logger.error("%s was not stored: %s", telling.what, describe(exc), exc_info=exc)
                    return False
                logger.warning("%s was not stored yet, trying again: %s", telling.what, describe(exc))
                time.sleep(pause_seconds)
            else:
                return True
        return False


def _end(what: str, then: Callable[[bool], None], is_told: bool) -> None:
    """Call `then`, whose errors must end neither the thread of the states nor the event loop."""
    try:
        then(is_told)
    except Exception:
        logger.exception("%s: an error after it was stored", what)
