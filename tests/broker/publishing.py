"""A publisher that goes on beside the test, so that what happens to the workers happens under load."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from shops import Shop


class Load:
    """Publishes to a shop, steadily, until it is left; its messages are numbered from 1 in the order of publishing.

    Args:
        keys: How many keys take turns.
        per_second: Messages in a second, at most.
        options: Of each `step`, such as `seconds`.
    """

    def __init__(self, shop: Shop, *, keys: int = 12, per_second: float = 60.0, **options: object) -> None:
        self.number = 0
        self._shop = shop
        self._keys = keys
        self._pause_seconds = 1.0 / per_second
        self._options = options
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._publish, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(30)
        if self._error is not None and exc is None:
            raise self._error

    def wait_for_more(self, count: int, *, timeout_seconds: float = 60.0) -> None:
        """Wait until `count` more messages than now have ended.

        Raises:
            AssertionError: They did not; the message is the verdict so far.
        """
        wanted = self._shop.trace.count() + count
        assert self._shop.trace.wait_for(wanted, timeout_seconds=timeout_seconds), self._shop.verdict()

    def _publish(self) -> None:
        try:
            while not self._done.wait(self._pause_seconds):
                self.number += 1
                self._shop.send("step", f"k{self.number % self._keys}", self.number, **self._options)
        except BaseException as exc:
            self._error = exc
