"""A publisher that does not stop for a fault: what it was told of each message is what the verdict is made of."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Self

from shops import Shop

from celery_sharding.errors import OutcomeUnknown, PublishError
from celery_sharding.testing.processes import wait_until

THREADS = 2


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
