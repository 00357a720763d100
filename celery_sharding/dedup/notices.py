"""What a run tells its worker: it was a duplicate, its commit was refused, or the claim store answers again.

The worker's main process makes `Notices` before its pool starts. A run in that process hands its notice over directly;
one in a forked child writes it to a pipe, as a line short enough for one atomic write. Without a worker (eager tasks)
nobody listens, and nothing happens.

Best effort: a notice is lost if its process dies, if the pipe is full, or if its names are too long for one write.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
from dataclasses import dataclass
from typing import Any, Protocol

from celery_sharding.wire import SHARD_ATTRIBUTE

DEDUPLICATED, COMMIT_REFUSED = "deduplicated", "commit-refused"
STORE_ANSWERS = "store-answers"
_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Notice:
    """`what` happened to the run of a task; `shard` is `GROUP/INDEX`, None if it is not sharded."""

    what: str
    task_id: str
    task: str
    shard: str | None


class NoticeHandler(Protocol):
    """What the worker does with notices."""

    def take(self, notice: Notice) -> None:
        """Handle a notice."""


class Notices:
    """Passes the notices of all runs of this worker to `handler`.

    It is called in the thread of the run if that is in this process, else in the one that calls `read`.
    """

    def __init__(self, handler: NoticeHandler) -> None:
        global _listener
        self._handler = handler
        self._pid = os.getpid()
        self._rest = b""
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)
        _listener = self

    def send(self, notice: Notice) -> None:
        """Pass a notice on, from any process and thread."""
        if os.getpid() == self._pid:
            self._handler.take(notice)
            return
        line = json.dumps([notice.what, notice.task_id, notice.task, notice.shard]).encode() + b"\n"
        if len(line) > select.PIPE_BUF:
            return  # Other children could write into the middle of it.
        with contextlib.suppress(OSError):
            os.write(self._writer, line)

    def read(self) -> None:
        while True:
            try:
                data = os.read(self.reader, _READ_BYTES)
            except BlockingIOError:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._handler.take(Notice(*json.loads(line)))


def notify_worker(task: Any, what: str) -> None:
    """Tell the worker, if there is one, what happened to the present run of `task`."""
    if _listener is not None and not task.request.is_eager:
        # The shard is what `celery_hooks.request` puts into the headers of a sharded run.
        _listener.send(Notice(what, task.request.id, task.name, task.request.get(SHARD_ATTRIBUTE)))


_listener: Notices | None = None
