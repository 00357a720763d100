"""Where and when the calls of one worker run.

With an event loop one thread, the main one, reads the connection and moves the lanes, and a call of another thread
wakes it. Without, lanes may be moved by any thread, and Celery's own loop runs what reads the connection.

    post         where lanes may be moved: in the event loop, or at once
    call_main    where the connection is read, asked by another thread
    call_soon    the same, asked by that thread: not within the call that asks
    call_next    in the next turn of the event loop, not in this one
    call_after   where lanes may be moved, at its moment: by a timer of our own, since Celery's may be a second late
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_sharding.worker.mailbox import Mailbox
from celery_sharding.worker.timer import Alarm, Timer


class Calls:
    """The ways to have something called in the worker of `consumer`, Celery's."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._mailbox = Mailbox() if consumer.hub else None
        self._timer = Timer(self)

    def attach(self, hub: Any) -> None:
        """Let `hub` run what is posted; needed again after each reset of the hub."""
        if self._mailbox is not None:
            self._mailbox.attach(hub)

    def deliver(self) -> None:
        """Run what was posted now: the event loop may have ended."""
        if self._mailbox is not None:
            self._mailbox.deliver()

    def post(self, call: Callable[[], None]) -> None:
        """Run a call of another thread where lanes may be moved."""
        if self._mailbox is not None:
            self._mailbox.post(call)
        else:
            call()

    def call_main(self, call: Callable[[], None]) -> None:
        """Run a call of another thread in the one that reads the connection."""
        if self._mailbox is not None:
            self._mailbox.post(call)
        else:
            self._consumer.call_soon(call)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run a call where the connection may be read, as soon as Celery's loop comes round."""
        self._consumer.call_soon(call)
        if self._mailbox is not None:
            # Asked from another such call, or a timer, the loop would wait for something to read first.
            self._mailbox.post(_do_nothing)

    def call_next(self, call: Callable[[], None]) -> None:
        """Run a call in the next turn of the event loop, not in this one, whoever asks."""
        hub = self._consumer.hub
        self.post(lambda: hub.call_soon(call))

    def call_after(self, seconds: float, call: Callable[[], None]) -> Alarm:
        """Run a call after some seconds, where lanes may be moved, whatever became of the connection meanwhile."""
        return self._timer.call_after(seconds, call)

    def stop(self) -> None:
        """Call nothing any more that waits for its moment."""
        self._timer.stop()


def _do_nothing() -> None:
    """Wake the event loop."""
