"""What is said of a store that does not answer: a line a minute from each process, however many runs it concerns."""

from __future__ import annotations

import logging
import threading
import time

EVERY_SECONDS = 60.0


class Complaints:
    """Says a thing of each kind once in a while, and counts the others. Safe for threads."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def forget(self) -> None:
        """Say the next of each kind."""
        with self._lock:
            self._last.clear()
            self._unsaid.clear()

    def say(self, kind: str, text: str, *args: object) -> None:
        """Log `text` as a warning, unless one of its kind was logged within a minute."""
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(kind, float("-inf")) < EVERY_SECONDS:
                self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
                return
            self._last[kind] = now
            unsaid = self._unsaid.pop(kind, 0)
        more = f" ({unsaid} more like this since the last such line)" if unsaid else ""
        self._logger.warning(text + "%s", *args, more)
