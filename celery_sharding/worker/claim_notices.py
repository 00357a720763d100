"""What runs under a claim tell their worker becomes an event for monitors, and is counted where its shard is."""

from __future__ import annotations

from typing import Any

from celery_sharding.dedup.notices import STORE_ANSWERS, Notice
from celery_sharding.worker.consume.groups import Groups
from celery_sharding.worker.run.waits import Waits


class ClaimNotices:
    """Takes the notices of all runs of the worker of `consumer`, Celery's."""

    def __init__(self, consumer: Any, waits: Waits, groups: Groups) -> None:
        self._consumer = consumer
        self._waits = waits
        self._groups = groups

    def take(self, notice: Notice) -> None:
        """Pass a notice on; called in the thread of the run, or in the one that reads the children's."""
        if notice.what == STORE_ANSWERS:
            self._waits.answers()
            return
        dispatcher = self._consumer.event_dispatcher
        if dispatcher is not None:
            dispatcher.send(f"task-{notice.what}", uuid=notice.task_id, name=notice.task)
        self._groups.count(notice)
