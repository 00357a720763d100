"""The one hook through which task messages leave.

Celery builds every task message in `app.amqp.send_task_message`, and `send_sharded` wraps it. Signals, serializers,
compression and task-sent events stay Celery's; the message itself is published by the backing, confirmed and mandatory,
and not by the caller's producer. Messages of ordinary tasks pass untouched.

A sharded task leaves for its group, or the call raises. Options that would break the order of a key are refused, or
dropped if Celery has set them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

from amqp.exceptions import AMQPError
from kombu import Producer
from kombu.connection import PooledConnection
from kombu.exceptions import OperationalError

from celery_sharding.errors import UnsupportedOption
from celery_sharding.publish.message import Outgoing
from celery_sharding.publish.router import is_ordinary_retry
from celery_sharding.rabbitmq.connect import FAREWELL_SECONDS, bound_waits
from celery_sharding.topology import Names
from celery_sharding.wire import GROUP_HEADER, MESSAGE_ID_HEADER, SENT_AT_HEADER, new_message_id, without_handed_on

logger = logging.getLogger(__name__)

# The AMQP properties that a caller may set. The others are Celery's, or could break the order.
_PROPERTIES = ("correlation_id", "reply_to", "message_id", "app_id", "user_id", "type", "timestamp", "cluster_id")


class PublishWatcher(Protocol):
    """Sees sharded tasks leave, for instrumentation."""

    def begin(self) -> Any:
        """Return what `leave` is to be told, before the message is built."""

    def leave(self, begun: Any, message: Outgoing) -> None:
        """See a message just before it leaves."""


class Sender(Protocol):
    """What the hook needs of the extension."""

    @property
    def publish_watcher(self) -> PublishWatcher | None: ...

    def backing(self) -> Any:
        """Return what publishes sharded tasks, by `publish(Outgoing)`."""

    def is_sharded(self, task_name: str) -> bool:
        """Say whether the tasks of this name belong to a group."""

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
    # A message that did not pass our router names a group only by headers that were handed on.
    if group is None or options.get("exchange") != Names(group).publish:
        if sender.is_sharded(name) and not is_ordinary_retry():
            raise refuse_router(name)
        if headers:
            options["headers"] = without_handed_on(headers)
        return stock(producer, name, message, **options)
    if not sender.is_own_broker(producer.connection):
        raise refuse_broker(name)
    # Quorum queues of RabbitMQ 4 deliver a higher priority first. And the broker would dead-letter an expired message,
    # where Celery's worker stores REVOKED: it reads `expires` from the headers.
    for dropped in ("priority", "expiration"):
        options.pop(dropped, None)
    # Celery writes these over the message's own.
    options["headers"] = {**headers, SENT_AT_HEADER: time.time(), MESSAGE_ID_HEADER: new_message_id()}
    channel = _ShardChannel(sender, group, options, producer.connection)
    options["retry"] = False
    try:
        return stock(_ShardProducer(producer, channel), name, message, **options)
    except BaseException:
        # When a publish fails, Celery's pool closes the connection it lent, and waits for the broker without a limit.
        if isinstance(producer.__connection__, PooledConnection):
            bound_waits(producer.connection, FAREWELL_SECONDS)
        raise


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


class _ShardProducer(Producer):
    """Stands in for the caller's producer: publishes the task, and leaves events to the real one.

    It is kombu's producer with another channel, so instrumentation that wraps `Producer.publish` or `Producer._publish`
    sees the message, and may add headers.
    """

    def __init__(self, producer: Any, channel: _ShardChannel) -> None:
        super().__init__(None, auto_declare=False)  # type: ignore[no-untyped-call]
        self.__connection__ = producer.connection
        self._channel = channel
        self._producer = producer
        self._exchange = Names(channel.group).publish

    def publish(self, body: Any, **options: Any) -> Any:  # type: ignore[override]
        if options.get("exchange") != self._exchange:
            return self._publish_event(body, options)
        return super().publish(body, **options)  # type: ignore[no-untyped-call]

    def _publish_event(self, body: Any, options: dict[str, Any]) -> Any:
        """Send the task-sent event. The task is confirmed by now: the caller must not take it for lost."""
        try:
            return self._producer.publish(body, **options)
        except (
            OSError,
            AMQPError,
            OperationalError,
            *self._producer.connection.connection_errors,
        ) as exc:  # such as SQL's
            logger.warning("the task-sent event of a task of group %s was not sent: %s", self._channel.group, exc)
            return None


class _ShardChannel:
    """What `Producer._publish` needs of a channel, and what wraps it: Datadog's asks for `channel.connection.host`."""

    def __init__(self, sender: Sender, group: str, options: Mapping[str, Any], connection: Any) -> None:
        self.group = group
        self._backing = sender.backing()
        self._retry_options = {name: options[name] for name in ("retry", "retry_policy") if name in options}
        self._client = connection
        self._watcher = sender.publish_watcher
        self._begun = None if self._watcher is None else self._watcher.begin()

    @property
    def connection(self) -> SimpleNamespace:
        """Where the channel's connection leads to, and kombu's connection."""
        client = self._client
        port = client.port or client.transport.default_port
        return SimpleNamespace(host=f"{client.hostname or 'localhost'}:{port}", client=client)

    def prepare_message(
        self,
        body: Any,
        priority: Any,
        content_type: str,
        content_encoding: str,
        headers: dict[str, Any],
        properties: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "payload": body if isinstance(body, bytes) else body.encode(),
            "content_type": content_type,
            "content_encoding": content_encoding,
            "headers": headers,
            "properties": {name: properties[name] for name in _PROPERTIES if properties.get(name) is not None},
        }

    def basic_publish(
        self,
        message: dict[str, Any],
        *,
        routing_key: str,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **_: Any,
    ) -> None:
        outgoing = Outgoing(
            self.group,
            routing_key,
            **message,
            timeout_seconds=confirm_timeout or timeout,
            retry_options=self._retry_options,
        )
        if self._watcher is not None:
            self._watcher.leave(self._begun, outgoing)
        self._backing.publish(outgoing)
