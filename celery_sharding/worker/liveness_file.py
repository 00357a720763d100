"""A file that says whether a worker is alive, for probes that must not ask it over the broker.

    starting ──▶ consuming ◀──▶ incomplete ──▶ stopping ──▶ no file
                   │     ▲
                   ▼     │
                 reconnecting

    consuming    all the shards that were selected for this worker, as owner or standby
    incomplete   the queue of one of them is missing, until the group is repaired
    bystander    a newer version acts on one of the groups, which this worker leaves alone until it is upgraded; all
                 others are consumed
    stopping     the pool drains

The file holds that word. Its modification time says that the main thread went round the worker's loop in the last
seconds: it grows old when that thread, or a hub of greenlets, is stuck. While the main thread may be away for long, the
time only says that the process runs: while it connects, while a solo pool runs a task, and while the pool drains.

A thread writes the file, so no task waits for a disk. It writes a new file and renames it, so readers see a whole one.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.utils.nodenames import node_format

from celery_sharding.errors import ConfigurationError
from celery_sharding.worker.bootstep import ShardsStep

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
_JOIN_SECONDS = 5.0

STARTING, CONSUMING, INCOMPLETE, BYSTANDER = "starting", "consuming", "incomplete", "bystander"
RECONNECTING, STOPPING = "reconnecting", "stopping"


class HeartbeatFile:
    """The file of one worker. Entered while a task runs in the main thread.

    Args:
        path: No other worker's; its directory exists. `%n`, `%h` and so on stand for parts of the node's name.
        node: This worker's name.

    Raises:
        ConfigurationError: It cannot be written.
    """

    def __init__(self, path: str, *, node: str) -> None:
        self._word = STARTING
        self._has_turned = self._is_turning = self._is_failing = False
        self._runs = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._path = Path(node_format(path, node)).absolute()
            self._new = Path(f"{self._path}.new")
            self._write()
        except (OSError, ValueError) as exc:
            raise ConfigurationError(
                f"sharding_heartbeat_file {path!r} cannot be written: {exc}; its directory must exist and be writable"
            ) from exc

    def begin(self) -> None:
        """Keep the file fresh from now on; later calls change nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shards-heartbeat-file", daemon=True)
            self._thread.start()

    def turn(self, *, is_consuming: bool, is_bystander: bool = False) -> None:
        """The main thread has gone round its loop, and must do so again for the next beat."""
        if is_consuming:
            self._word = BYSTANDER if is_bystander else CONSUMING
        elif self._word in (CONSUMING, BYSTANDER):
            self._word = INCOMPLETE
        self._has_turned = self._is_turning = True

    def leave(self, word: str) -> None:
        """The main thread has left its loop, and may be away for long."""
        self._word = word
        self._is_turning = False

    def __enter__(self) -> None:
        self._runs += 1

    def __exit__(self, *_: object) -> None:
        self._runs -= 1

    def end(self) -> None:
        """Remove the file."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        for path in (self._path, self._new):
            with suppress(OSError):
                path.unlink()

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if self._has_turned or self._runs or not self._is_turning:
                self._has_turned = False
                self._beat()

    def _beat(self) -> None:
        try:
            self._write()
        except OSError as exc:
            if not self._is_failing:
                logger.error("the heartbeat file can no longer be written: %s", exc)
            self._is_failing = True
            # On a full disk: a worker that lives must not be taken for dead.
            with suppress(OSError):
                os.utime(self._path)
            return
        if self._is_failing:
            logger.info("the heartbeat file is written again")
        self._is_failing = False

    def _write(self) -> None:
        self._new.write_text(f"{self._word}\n")
        self._new.replace(self._path)


class HeartbeatStep(bootsteps.StartStopStep):
    """Keeps the file that the setting `sharding_heartbeat_file` names."""

    label = "Heartbeat file"
    requires = (ShardsStep,)

    def include_if(self, c: Any) -> bool:
        return c.app.sharding.settings.heartbeat_file is not None

    def create(self, c: Any) -> None:
        """Write it, before the broker is asked for anything."""
        self._timer: Any = None
        self._groups = c.shards
        self._file = HeartbeatFile(c.app.sharding.settings.heartbeat_file, node=c.hostname)
        c.shards_site.watchers.append(self)
        c.shards_site.around_tasks.append(self._file)

    def connecting(self) -> None:
        """Start the thread at the first connect: the pool has forked by then, and waits for the broker come next."""
        self._file.begin()

    def register_with_event_loop(self, c: Any, hub: Any) -> None:
        """Note each second that the event loop turns."""
        self._timer = c.timer.call_repeatedly(BEAT_SECONDS, self.turned)

    def turned(self) -> None:
        """Note that the main thread has gone round its loop."""
        self._file.turn(is_consuming=self._groups.is_consuming, is_bystander=self._groups.is_bystander)

    def stop(self, c: Any) -> None:
        """The loop has ended: the connection is lost, or the worker stops."""
        if self._timer is not None:
            self._timer.cancel()
        self._file.leave(RECONNECTING if c.blueprint.state == bootsteps.RUN else STOPPING)

    terminate = stop

    def shutdown(self, c: Any) -> None:
        self._file.end()
