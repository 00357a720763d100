"""The rate-limit buckets of a worker, hidden from strategies that would take a message out of its place.

A strategy asks `consumer.task_buckets`, and so do the commands that change a limit.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any


class Buckets(defaultdict[str, Any]):
    """Task name → rate-limit bucket or None, in place of those of `consumer`, Celery's; `get` sees a hidden one.

    Made before the strategies, which keep hold of it.
    """

    def __init__(self, consumer: Any) -> None:
        super().__init__(lambda: None, consumer.task_buckets)
        self.are_hidden = False
        consumer.task_buckets = self

    def __getitem__(self, task_name: str) -> Any:
        return None if self.are_hidden else super().__getitem__(task_name)
