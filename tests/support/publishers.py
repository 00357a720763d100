"""Publishers that go on beside the test, so that what happens to workers and links happens under load."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Self

from celery_sharding.errors import OutcomeUnknown, PublishError
from celery_sharding.testing.processes import wait_until
from support.shops import Shop

THREADS = 2


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


class SteadyPublisher:
    """Publishes to many keys from threads, each with keys of its own, until the `with` block ends.

    What was confirmed goes into `shop.published`. A key whose message has an unknown outcome gets no further messages,
    since that one may arrive behind them; the publisher goes on with another key.
    """

    def __init__(self, shop: Shop, *, keys: int = 8, pause_seconds: float = 0.03) -> None:
        self.errors: Counter[str] = Counter()
        self.unknown: set[tuple[str, int]] = set()
        self.not_stored: set[tuple[str, int]] = set()
        self.unexpected: list[BaseException] = []
        self._shop = shop
        self._pause_seconds = pause_seconds
        self._lock = threading.Lock()
        self._ended = threading.Event()
        keys_each = keys // THREADS
        self._threads = [
            threading.Thread(target=self._run, args=([f"k{index}.{number}" for number in range(keys_each)],))
            for index in range(THREADS)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def goes_on(self, count: int = 30, *, timeout_seconds: float = 60.0) -> bool:
        """Wait until `count` more messages were confirmed, and as many more have run; False if it takes too long."""
        confirmed, ended = len(self._shop.published) + count, self._shop.trace.count() + count
        return wait_until(
            lambda: len(self._shop.published) >= confirmed, timeout_seconds=timeout_seconds
        ) and self._shop.trace.wait_for(ended, timeout_seconds=timeout_seconds)

    def _run(self, keys: list[str]) -> None:
        number = 0
        try:
            while not self._ended.wait(self._pause_seconds):
                number += 1
                place = number % len(keys)
                if not self._publish(keys[place], number):
                    keys[place] = f"{keys[place]}'"
        except BaseException as exc:
            self.unexpected.append(exc)
            raise

    def _publish(self, key: str, number: int) -> bool:
        """Publish one message; False if its outcome is unknown."""
        try:
            self._shop.app.send_task(f"{self._shop.module}.step", kwargs={"key": key, "number": number})
        except PublishError as exc:
            is_known = not isinstance(exc, OutcomeUnknown)
            with self._lock:
                self.errors[type(exc).__name__] += 1
                (self.not_stored if is_known else self.unknown).add((key, number))
            return is_known
        with self._lock:
            self._shop.published.append((key, number))
        return True
