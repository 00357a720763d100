"""Where and when the calls of one worker run.

With an event loop, the main thread reads the connection and moves the lanes, and a call of another thread wakes it.
Without one, any thread may move lanes, and Celery's own loop runs what reads the connection.

    post         where lanes may be moved: in the event loop, or at once
    call_main    where the connection is read, from another thread
    call_soon    the same, from that thread: after the call that asks
    call_next    in the next turn of the event loop, never in this one
    call_after   where lanes may be moved, after some seconds: by our own timer, since Celery's may be a second late
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from celery_sharding.worker.timer import Timer


class Calls:
    """The ways to have something called in the worker of `consumer`, Celery's.

    Calls that are posted while no event loop runs (before the first connection, while the pool is drained) wait for the
    next `attach` or `deliver`.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._posted: deque[Callable[[], None]] | None = deque() if consumer.hub else None
        if self._posted is not None:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._reader, False)
            os.set_blocking(self._writer, False)
        self._timer = Timer(self)

    def attach(self, hub: Any) -> None:
        """Let `hub` run what is posted; needed again after each reset of the hub."""
        if self._posted is not None:
            hub.add_reader(self._reader, self._on_readable)
            self.deliver()

    def deliver(self) -> None:
        """Run what was posted now: the event loop may have ended."""
        while self._posted:
            self._posted.popleft()()

    def post(self, call: Callable[[], None]) -> None:
        if self._posted is None:
            call()
            return
        self._posted.append(call)
        # A full pipe has woken the loop already.
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"\0")

    def call_main(self, call: Callable[[], None]) -> None:
        if self._posted is not None:
            self.post(call)
        else:
            self._consumer.call_soon(call)

    def call_soon(self, call: Callable[[], None]) -> None:
        self._consumer.call_soon(call)
        if self._posted is not None:
            # Otherwise the loop, if it runs another such call or a timer now, would wait for something to read first.
            self.post(_do_nothing)

    def call_next(self, call: Callable[[], None]) -> None:
        hub = self._consumer.hub
        self.post(lambda: hub.call_soon(call))

    def call_after(self, seconds: float, call: Callable[[], None]) -> None:
        self._timer.call_after(seconds, call)

    def stop(self) -> None:
        """Drop what waits for its moment."""
        self._timer.stop()

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self.deliver()


def _do_nothing() -> None:
    """Wake the event loop."""
