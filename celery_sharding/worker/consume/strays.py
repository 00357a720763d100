"""Messages of sharded tasks that came by an ordinary queue: they run in no order, and the log says so once per task.

They are not refused: while a task moves onto a group, its old queue still holds them. But a publisher without
`Sharding(app)`, or with another configuration, goes on sending them unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class Strays:
    """Warns, once for each task, of messages that are not in the order of their group.

    Args:
        sharded: Task name → group name, of the tasks that this worker runs from shards.
    """

    def __init__(self, sharded: Mapping[str, str]) -> None:
        self._sharded = sharded
        self._told: set[str] = set()

    def note(self, request: Any) -> None:
        """Look at the request of a message from an ordinary queue."""
        name = request.name
        if name not in self._sharded or name in self._told:
            return
        self._told.add(name)
        found = request.delivery_info or {}
        logger.warning(
            "task %s belongs to the shard group %s, but %s[%s] came by the ordinary queue %s, sent by %s, and runs in "
            "no order. If the task has just moved onto its group, that queue is being worked off; else its publisher "
            "lacks Sharding(app), or the task's shard_group or route. Said once for each task",
            name,
            self._sharded[name],
            name,
            request.id,
            found.get("routing_key") or found.get("exchange"),
            request.request_dict.get("origin") or "a publisher that does not tell its name",
        )
