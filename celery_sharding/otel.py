"""OpenTelemetry: attributes of its messaging conventions on the spans of sharded tasks. Needs the extra `otel`.

Makes no spans: `opentelemetry-instrumentation-celery` does, and whichever of the two is set up first, its spans of
publishing and of running get what it cannot know: the exchange, the group and the shard. Spans of the caller's own are
left alone.

A shard key is an attribute only if asked for, and then as a keyed hash: keys are often ids that could be guessed from a
plain one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from opentelemetry import trace

from celery_sharding.errors import ConfigurationError
from celery_sharding.extension import Sharding
from celery_sharding.keys import KEY_HEADER
from celery_sharding.topology import Names

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
        raise ConfigurationError("key_secret is empty; leave it out to have no attribute of the key")
    attributes = _Attributes(key_secret)
    sharding.watch_publish = attributes.watch_publish

    def on_run(task: Any, **_: Any) -> None:
        if task.app is app:
            attributes.add_to_run(task.request)

    # Before the run the span is there if its maker was connected first, after it if it was connected later.
    for number, signal in enumerate((signals.task_prerun, signals.task_postrun)):
        signal.connect(on_run, weak=False, dispatch_uid=f"celery_sharding.otel/{number}/{id(app)}")


class _Attributes:
    def __init__(self, key_secret: str | None) -> None:
        self._key_secret = None if key_secret is None else key_secret.encode()

    def watch_publish(self) -> Callable[[str, str, str | None], None]:
        """Return what is to be called when a message leaves; called before the span of the publish can be there."""
        outer = trace.get_current_span()

        def add(group: str, key: str, task_id: str | None) -> None:
            span = trace.get_current_span()
            if span is not outer and span.is_recording():
                span.set_attributes(
                    {
                        **_common(group, task_id),
                        "messaging.operation.name": "publish",
                        "messaging.operation.type": "send",
                        **self._hashed(key),
                    }
                )

        return add

    def add_to_run(self, request: Any) -> None:
        span, shard = trace.get_current_span(), request.get("shard")
        if not shard or not span.is_recording():
            return
        group, _, index = shard.rpartition("/")
        key = (request.headers or {}).get(KEY_HEADER) or request.get(KEY_HEADER)
        key = key or (request.delivery_info or {}).get("routing_key")
        span.set_attributes(
            {
                **_common(group, request.id),
                "messaging.consumer.group.name": group,
                "messaging.destination.partition.id": index,
                "messaging.operation.name": "run",
                "messaging.operation.type": "process",
                **self._hashed(key),
            }
        )

    def _hashed(self, key: str | None) -> dict[str, str]:
        if self._key_secret is None or not key:
            return {}
        return {KEY_HASH: hmac.new(self._key_secret, key.encode(), hashlib.sha256).hexdigest()[:16]}


def _common(group: str, task_id: str | None) -> dict[str, str]:
    # The conventions would have the routing key in the name, too; it is the key here.
    attributes = {"messaging.system": "rabbitmq", "messaging.destination.name": Names(group).publish}
    return attributes | ({"messaging.message.id": task_id} if task_id else {})
