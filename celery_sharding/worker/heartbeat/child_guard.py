"""Lets the children of a prefork pool end their runs themselves when the main process shows no sign of life.

`watchdog` ends the runs of a blocked main thread. It cannot when the whole process stands still: stopped by a signal,
frozen with its container, or in C code that holds the GIL. So it notes in memory shared with the children when the last
frame left for the broker, and each child checks that while it runs a task of a shard:

    no frame for 1.75 heartbeats ──▶ the child kills itself; a task that was about to begin does not

That is after the watchdog would have acted, and before the broker gives the shards to another worker. Ordinary tasks
are spared. A thread of each child checks, so a task that holds the GIL itself is not ended.

Children that a spawned interpreter runs share no memory with the main process, and have no guard.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time
from typing import Any

from celery import signals

from celery_sharding.wire import SHARD_ATTRIBUTE

_SILENT_HEARTBEATS = 1.75
_LOOKS = 16
_IDLE_SECONDS = 1.0
_LAYOUT = struct.Struct("dd")  # when the last frame left, by the clock that all processes share; the heartbeat


class ChildGuard:
    """The memory that a worker shares with its children; made before the pool forks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _LAYOUT.size)
        self._running = 0
        signals.worker_process_init.connect(self._begin, weak=False)
        signals.task_prerun.connect(self._on_prerun, weak=False)
        signals.task_postrun.connect(self._on_postrun, weak=False)
        self._pid = os.getpid()

    def note(self, left_at: float, heartbeat_seconds: float) -> None:
        """Note when the last frame left; a heartbeat of 0: there is no connection to guard."""
        _LAYOUT.pack_into(self._memory, 0, left_at, heartbeat_seconds)

    def _begin(self, **_: Any) -> None:
        threading.Thread(target=self._look, name="shards-guard", daemon=True).start()

    def _on_prerun(self, task: Any = None, **_: Any) -> None:
        if os.getpid() != self._pid and task.request.get(SHARD_ATTRIBUTE):
            self._running += 1
            self._end_if_silent()

    def _on_postrun(self, task: Any = None, **_: Any) -> None:
        if os.getpid() != self._pid and task.request.get(SHARD_ATTRIBUTE):
            self._running -= 1

    def _look(self) -> None:
        while True:
            heartbeat_seconds = self._end_if_silent()
            time.sleep(heartbeat_seconds / _LOOKS or _IDLE_SECONDS)

    def _end_if_silent(self) -> float:
        left_at, heartbeat_seconds = _LAYOUT.unpack_from(self._memory)
        silent_seconds = time.monotonic() - left_at
        if self._running and heartbeat_seconds and silent_seconds > _SILENT_HEARTBEATS * heartbeat_seconds:
            # Not by the log: its lock may be held by what is ended.
            text = f"[{os.getpid()}] the worker has sent nothing for {silent_seconds:.1f} s: the run is ended\n"
            os.write(2, text.encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return float(heartbeat_seconds)
