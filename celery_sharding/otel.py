"""OpenTelemetry: attributes of its messaging conventions on the spans of sharded tasks. Needs the extra `otel`.

Makes no spans: `opentelemetry-instrumentation-celery` does. Its spans of publishing and of running get what it cannot
know: the exchange, the group and the shard, whichever of the two is set up first. Other spans are left alone.

A shard key becomes an attribute only on request, and then as a keyed hash: a plain hash of an id could be guessed. That
instrumentation takes the routing key, which is the shard key, for the destination; here the exchange takes its place,
and during a run `self.request.delivery_info["routing_key"]` is the exchange, too.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from celery import Celery, signals
from opentelemetry import trace

from celery_sharding.errors import ConfigurationError
from celery_sharding.extension import Sharding
from celery_sharding.publish.message import Outgoing
from celery_sharding.topology import Names
from celery_sharding.wire import SHARD_ATTRIBUTE

KEY_HASH = "celery_sharding.key_hash"


def instrument(app: Celery, *, key_secret: str | None = None) -> None:
    """Add attributes to the spans of the app's sharded tasks, in this process and those it forks; once.

    Args:
        key_secret: If given, `celery_sharding.key_hash` is the start of the key's HMAC-SHA-256 with it. Not "".

    Raises:
        ConfigurationError: The app has no `Sharding`, or the secret is empty.
    """
    sharding = getattr(app, "sharding", None)
    if not isinstance(sharding, Sharding):
        raise ConfigurationError(f"app {app.main!r} has no Sharding; call Sharding(app) before instrument(app)")
    if key_secret is not None and not key_secret:
        raise ConfigurationError("key_secret is empty; leave it out for no attribute of the key")
    attributes = _Attributes(key_secret)
    sharding.publish_watcher = attributes

    def on_run(task: Any, **_: Any) -> None:
        if task.app is app and task.request.get(SHARD_ATTRIBUTE):
            attributes.hide_key(task.request)
            attributes.add_to_run(task.request)

    # The span exists before the run if its maker was connected first, only after the run otherwise.
    for number, signal in enumerate((signals.task_prerun, signals.task_postrun)):
        signal.connect(on_run, weak=False, dispatch_uid=f"celery_sharding.otel/{number}/{id(app)}")


class _Attributes:
    def __init__(self, key_secret: str | None) -> None:
        self._key_secret = None if key_secret is None else key_secret.encode()

    def begin(self) -> Any:
        """Return the span outside of the publish, whose own cannot be there yet."""
        return trace.get_current_span()

    def leave(self, begun: Any, message: Outgoing) -> None:
        """Add to the span of the publish, if there is one."""
        span = trace.get_current_span()
        if span is not begun and span.is_recording():
            span.set_attributes(
                {
                    **_common(message.group, message.task_id),
                    "messaging.destination": Names(message.group).publish,
                    "messaging.operation.name": "publish",
                    "messaging.operation.type": "send",
                    **({KEY_HASH: self._hash(message.key)} if self._key_secret else {}),
                }
            )

    def hide_key(self, request: Any) -> None:
        info = dict(request.delivery_info or {})
        if KEY_HASH not in info:
            key = info.get("routing_key")
            group = request.get(SHARD_ATTRIBUTE).rpartition("/")[0]
            request.delivery_info = info | {"routing_key": Names(group).publish, KEY_HASH: self._hash(key)}

    def add_to_run(self, request: Any) -> None:
        span = trace.get_current_span()
        if not span.is_recording():
            return
        group, _, index = request.get(SHARD_ATTRIBUTE).rpartition("/")
        hashed = request.delivery_info[KEY_HASH]
        span.set_attributes(
            {
                **_common(group, request.id),
                "messaging.consumer.group.name": group,
                "messaging.destination.partition.id": index,
                "messaging.operation.name": "run",
                "messaging.operation.type": "process",
                **({KEY_HASH: hashed} if hashed else {}),
            }
        )

    def _hash(self, key: str | None) -> str:
        """Return the hash of `key`, "" if it is not wanted."""
        if self._key_secret is None or not key:
            return ""
        return hmac.new(self._key_secret, key.encode(), hashlib.sha256).hexdigest()[:16]


def _common(group: str, task_id: str | None) -> dict[str, str]:
    # The conventions put the routing key into the name, too; here that is the shard key.
    attributes = {"messaging.system": "rabbitmq", "messaging.destination.name": Names(group).publish}
    return attributes | ({"messaging.message.id": task_id} if task_id else {})
