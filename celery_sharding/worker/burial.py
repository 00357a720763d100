"""Storing a message as a dead letter: whole, with why, where and when it died.

The letter is confirmed before the message may be acknowledged. The journal hears of it without the error's text, which
may hold data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_sharding.headers import (
    ATTEMPTS_HEADER,
    DEAD_AT_HEADER,
    ERROR_HEADER,
    GROUP_HEADER,
    KEY_HEADER,
    QUEUE_HEADER,
    REASON_HEADER,
)
from celery_sharding.journal import dead_event
from celery_sharding.worker.delivery import Delivery

if TYPE_CHECKING:
    from celery_sharding.worker.log import Log

logger = logging.getLogger(__name__)


def store_dead_letter(
    log: Log, delivery: Delivery, *, node: str, reason: str, error: str | None, stored: Callable[[], None]
) -> None:
    """Store `delivery` in its group's dead-letter queue, and call `stored` when the broker has it."""
    names, message, task = delivery.shard.names, delivery.message, delivery.headers.get("task")
    detail = f" ({error})" if error else ""
    logger.error("%s: task %s[%s] becomes a dead letter: %s%s", delivery.label, task, delivery.task_id, reason, detail)
    delivery.shard.count("dead")
    log.put(
        names.dead,
        message.body if isinstance(message.body, bytes) else str(message.body).encode(),
        stored,
        content_type=message.content_type or "application/octet-stream",
        content_encoding=message.content_encoding or "binary",
        correlation_id=delivery.task_id or "",
        application_headers=_headers(delivery, reason=reason, error=error),
    )
    event = dead_event(
        delivery.shard.queue,
        owner=node,
        task_id=delivery.task_id,
        task=task,
        reason=reason,
        attempts=delivery.attempts or 0,
    )
    log.append(names.journal, event, optional=True)


def _headers(delivery: Delivery, *, reason: str, error: str | None) -> dict[str, Any]:
    """Return the headers of a dead letter: the original ones, and why, where and when it died."""
    original = dict(delivery.headers)
    if not delivery.message.errors:
        original.pop("compression", None)  # kombu has decompressed the body
    return {
        **original,
        GROUP_HEADER: delivery.shard.group.name,
        KEY_HEADER: delivery.key,
        QUEUE_HEADER: delivery.shard.queue,
        REASON_HEADER: reason,
        ERROR_HEADER: error or "",
        ATTEMPTS_HEADER: delivery.attempts or 0,
        DEAD_AT_HEADER: time.time(),
    }
