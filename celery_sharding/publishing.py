"""The one hook through which task messages leave.

Celery builds every task message in `app.amqp.send_task_message`. `send_sharded` stands around it: signals, serializers,
compression and task-sent events stay Celery's, while the message itself is published by the backing, confirmed and
mandatory, instead of the caller's producer. Other messages pass untouched.

A sharded task leaves here for its group or raises; what would overtake or outlive its order is refused or dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from amqp.exceptions import AMQPError
from kombu.compression import compress
from kombu.exceptions import OperationalError
from kombu.serialization import dumps

from celery_sharding.errors import UnsupportedOption
from celery_sharding.headers import GROUP_HEADER, MESSAGE_ID_HEADER, SENT_AT_HEADER, new_message_id, without_marks
from celery_sharding.routing import is_ordinary_retry
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)

# AMQP properties that a caller may set; the others are Celery's, or could break the order.
_PROPERTIES = ("correlation_id", "reply_to", "message_id", "app_id", "user_id", "type", "timestamp", "cluster_id")


WatchPublish = Callable[[], Callable[[str, str, str | None], None]]  # called with group, key and task id


class Sender(Protocol):
    """What the hook needs of the extension."""

    def backing(self) -> Any:
        """Return what publishes sharded tasks; `Publisher.publish` says how."""

    def is_sharded(self, task_name: str) -> bool:
        """Say whether the tasks of this name belong to a group."""

    @property
    def watch_publish(self) -> WatchPublish | None:
        """Called before a sharded task is built; what it returns is called just before the message leaves."""

    def is_own_broker(self, connection: Any) -> bool:
        """Say whether a kombu connection leads to the app's broker."""


def send_sharded(
    stock: Callable[..., Any], sender: Sender, producer: Any, name: str, message: Any, **options: Any
) -> Any:
    """Send a task message: a sharded one confirmed and mandatory, any other as Celery does.

    Args:
        stock: Celery's own `send_task_message`.

    Raises:
        UnsupportedOption: eta or countdown on a sharded task, a router or a broker of the caller's own; nothing was
            published.
        PublishError: The broker did not confirm.
    """
    headers = options.get("headers") or {}
    group = headers.get(GROUP_HEADER)
    is_delayed = (message.headers.get("eta") if message.headers else message.body.get("eta")) is not None
    if group is not None and is_delayed and sender.is_sharded(name):
        raise refuse_delay(name)
    # Past the router a group is only named by headers that were handed on.
    if group is None or options.get("exchange") != Names(group).publish:
        if sender.is_sharded(name) and not is_ordinary_retry():
            raise refuse_router(name)
        if headers:
            options["headers"] = without_marks(headers)
        return stock(producer, name, message, **options)
    if not sender.is_own_broker(producer.connection):
        raise refuse_broker(name)
    # Quorum queues of RabbitMQ 4 deliver a higher priority first; and the broker would dead-letter what has expired,
    # where Celery's worker stores REVOKED: it reads `expires` from the headers.
    for dropped in ("priority", "expiration"):
        options.pop(dropped, None)
    # Celery writes these over the message's own.
    options["headers"] = {**headers, SENT_AT_HEADER: time.time(), MESSAGE_ID_HEADER: new_message_id()}
    options["retry"] = False
    note = None if sender.watch_publish is None else sender.watch_publish()
    return stock(_ShardProducer(producer, group, sender.backing().publish, note), name, message, **options)


def refuse_router(task: str) -> UnsupportedOption:
    return UnsupportedOption(
        f"task {task!r} is sharded, but was sent past the app's router and would leave without its key; remove "
        "router=… or route_name=… from the call",
        task=task,
        option="router",
    )


def refuse_delay(task: str) -> UnsupportedOption:
    return UnsupportedOption(
        f"task {task!r} is sharded and called with eta or countdown, which cannot keep the order of its key; "
        "publish it when it is due, or use a task outside the group as a timer",
        task=task,
        option="eta",
    )


def refuse_broker(task: str) -> UnsupportedOption:
    return UnsupportedOption(
        f"task {task!r} is sharded, and its group lives on the app's broker; the call names another by "
        "connection=… or producer=…. Remove it, or use an app of that broker",
        task=task,
        option="connection",
    )


class _ShardProducer:
    """Stands in for the caller's producer: publishes the task itself, leaves events to the real one."""

    def __init__(
        self,
        producer: Any,
        group: str,
        publish: Callable[..., None],
        note: Callable[[str, str, str | None], None] | None,
    ) -> None:
        self._producer = producer
        self._group = group
        self._publish = publish
        self._note = note
        self._exchange = Names(group).publish

    def publish(self, body: Any, **options: Any) -> Any:
        if options.get("exchange") != self._exchange:
            return self._publish_event(body, options)
        headers = options["headers"]
        content_type, content_encoding, payload = dumps(body, serializer=options.get("serializer"))
        if options.get("compression"):
            payload, headers["compression"] = compress(payload, options["compression"])
        properties = {name: options[name] for name in _PROPERTIES if options.get(name) is not None}
        task_id = headers.get("id") or properties.get("correlation_id")
        if self._note is not None:
            self._note(self._group, options["routing_key"], task_id)
        self._publish(
            self._group,
            options["routing_key"],
            payload if isinstance(payload, bytes) else payload.encode(),
            content_type=content_type,
            content_encoding=content_encoding,
            headers=headers,
            properties=properties,
            task_id=task_id,
            timeout_seconds=options.get("confirm_timeout") or options.get("timeout"),
        )
        return None

    def _publish_event(self, body: Any, options: dict[str, Any]) -> Any:
        """Send the task-sent event. The task is confirmed by now: the caller must not take it for lost."""
        try:
            return self._producer.publish(body, **options)
        except (OSError, AMQPError, OperationalError) as exc:
            logger.warning("the task-sent event of a task of group %s was not sent: %s", self._group, exc)
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)
