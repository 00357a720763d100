"""Calls handed from other threads to the worker's event loop, which wakes at once."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """Runs posted calls in the thread of the event loop it is attached to, in order.

    Calls that are posted while no loop runs (before the first connection, while the pool is drained) wait for the next
    `attach` or `deliver`.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def post(self, call: Callable[[], None]) -> None:
        """Take a call from any thread."""
        self._calls.append(call)
        # A full pipe has woken the loop already.
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"\0")

    def attach(self, hub: Any) -> None:
        """Let `hub` deliver; needed again after each reset of the hub."""
        hub.add_reader(self._reader, self._on_readable)
        self.deliver()

    def deliver(self) -> None:
        """Run what was posted."""
        while self._calls:
            self._calls.popleft()()

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self.deliver()
