"""Ends the runs of a prefork pool whose main thread is blocked, before the broker gives their shards to other workers.

The main thread sends the heartbeats. Whatever blocks it (a signal receiver, a driver that waits, a swapping host) stops
them. After two heartbeats without a frame the broker closes the connection, and another worker runs what this one's
children still run. No other thread may send heartbeats for a main thread that may never come back. So a thread watches
when the last frame left, and acts in time:

    a frame leaves at least every 3/4 of a heartbeat ──none for 1.5──▶ what runs from shards is killed; when it has
                                                                       ended, the connection is closed

The broker learns of that at once. The main thread, when it comes back, finds a lost connection, as after a cut: the
runs are orphans, and their attempts are not counted here. Children that run ordinary tasks are spared.

A main process that is stopped as a whole (SIGSTOP, a frozen container) stops this thread, too: then the children end
themselves (`child_guard`), which is why this thread tells them what it sees.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Collection
from typing import Any, Protocol

from celery_sharding.celery_hooks.connecting import WorkerConnection
from celery_sharding.celery_hooks.heartbeats import open_amqp_connection
from celery_sharding.celery_hooks.prefork import PreforkPool, is_gone
from celery_sharding.worker.heartbeat.child_guard import ChildGuard

logger = logging.getLogger(__name__)

_LOOKS = 8
_SILENT_HEARTBEATS = 1.5
_IDLE_SECONDS = 0.5
_POLL_SECONDS = 0.005


class RunningRequests(Protocol):
    """The runs of the pool."""

    def running(self) -> Collection[Any]:
        """Return the requests that a process of the pool runs, or may begin any moment; for any thread."""


class Watchdog:
    """Watches the connection of one worker, and ends what its children run when nothing leaves on it any more."""

    def __init__(
        self, connection: WorkerConnection, pool: PreforkPool, runs: RunningRequests, guard: ChildGuard
    ) -> None:
        self._connection = connection
        self._pool = pool
        self._runs = runs
        self._guard = guard
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch, after the pool has forked; once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shards-watchdog", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        watched: Any = None
        frames, left_at, has_bitten = 0, 0.0, False
        while True:
            inner = open_amqp_connection(self._connection.current)
            if inner is None or inner is not watched:
                watched, left_at, has_bitten = inner, time.monotonic(), False
                frames = getattr(inner, "bytes_sent", 0)
            if inner is None:
                self._guard.note(0.0, 0.0)
                time.sleep(_IDLE_SECONDS)
                continue
            time.sleep(inner.heartbeat / _LOOKS)
            now = time.monotonic()
            # Before it is seen whether a frame has left meanwhile: this thread may have been stopped, too.
            if not has_bitten and now - left_at > _SILENT_HEARTBEATS * inner.heartbeat:
                has_bitten = self._bite(inner, now - left_at)
            if inner.bytes_sent != frames:  # py-amqp counts frames in it
                frames, left_at = inner.bytes_sent, now
            self._guard.note(left_at, inner.heartbeat)

    def _bite(self, inner: Any, silent_seconds: float) -> bool:
        """End what runs and close the connection; False if nothing ran.

        What waited for a process was struck off: that, too, needs a connection that is lost to be run at all.
        """
        try:
            found = self._pool.cut_off(self._runs.running())
            if found is None:
                return False
            pids = set(found)
            logger.error(
                "nothing was sent to the broker for %.1f s, since the main thread is blocked: the %d processes that "
                "run sharded tasks are killed, before their shards go to another worker",
                silent_seconds,
                len(pids),
            )
            while not all(map(is_gone, pids)):
                time.sleep(_POLL_SECONDS)
            # Not the method of a TLS socket: that forgets its state, which the main thread may be about to use.
            socket.socket.shutdown(inner.sock, socket.SHUT_RDWR)
        except Exception:
            logger.exception("the runs of a silent connection could not be ended, or it could not be closed")
        return True
