"""Task messages put together by hand, as a publisher in another language may."""

from __future__ import annotations

import json
import uuid
from typing import Any

import amqp
from kombu import Connection
from kombu.compression import compress
from kombu.serialization import dumps

from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import publish_confirmed
from celery_sharding.topology import Names


def task_message(
    task: str, kwargs: dict[str, Any], *, serializer: str = "json", compression: str | None = None, **headers: Any
) -> amqp.Message:
    """Return a task message of protocol 2; `headers` replace its own."""
    content_type, content_encoding, body = dumps([[], kwargs, {}], serializer=serializer)
    told = {"task": task, "id": str(uuid.uuid4()), "retries": 0, "lang": "py"}
    if compression is not None:
        body, told["compression"] = compress(body, compression)
    return amqp.Message(
        body if isinstance(body, bytes) else body.encode(),
        content_type=content_type,
        content_encoding=content_encoding,
        delivery_mode=2,
        application_headers={**told, **headers},
    )


def publish(connection: Connection, names: Names, key: str | bytes, message: amqp.Message) -> None:
    """Publish a message to a group under `key`, confirmed."""
    with brief_channel(connection) as channel:
        publish_confirmed(channel, message, key, exchange=names.publish, timeout_seconds=10)  # type: ignore[arg-type]


def body_of(key: str, number: int, **kwargs: Any) -> str:
    return json.dumps([[], {"key": key, "number": number, **kwargs}, {}])
