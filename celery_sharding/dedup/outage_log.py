"""Warnings about a claim store that does not answer: one a minute from each process, however many runs wait for it."""

from __future__ import annotations

import logging
import threading
import time

EVERY_SECONDS = 60.0


class OutageLog:
    """Logs one warning of each kind a minute, and counts the others. Safe for threads."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._skipped: dict[str, int] = {}

    def reset(self) -> None:
        """Log the next warning of each kind."""
        with self._lock:
            self._last.clear()
            self._skipped.clear()

    def warn(self, kind: str, text: str, *args: object) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(kind, float("-inf")) < EVERY_SECONDS:
                self._skipped[kind] = self._skipped.get(kind, 0) + 1
                return
            self._last[kind] = now
            skipped = self._skipped.pop(kind, 0)
        more = f" ({skipped} more since the last such line)" if skipped else ""
        self._logger.warning(text + "%s", *args, more)
