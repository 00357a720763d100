"""Publishes a Celery task to a shard group with pika alone: no Celery, no celery-sharding.

    python publish.py ORDER_ID KIND…

What matters is in `publish`: the exchange, the key as routing key, a persistent and mandatory message, and a confirm
before the next one.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid

import pika
from pika.exceptions import NackError, UnroutableError

GROUP = "orders"


def publish(channel: pika.adapters.blocking_connection.BlockingChannel, task: str, key: str, *args: object) -> str:
    """Publish one call and return its task id when the broker has stored it.

    Raises:
        UnroutableError: It was returned: not stored.
        NackError: It was refused: not stored.
        AMQPError: The connection broke: nobody knows whether it is stored.
    """
    task_id = str(uuid.uuid4())
    channel.basic_publish(
        exchange=f"shards.{GROUP}",
        routing_key=key,
        mandatory=True,
        body=json.dumps([args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode(),
        properties=pika.BasicProperties(
            content_type="application/json",
            content_encoding="utf-8",
            correlation_id=task_id,
            delivery_mode=2,
            headers={
                "lang": "py",
                "task": task,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "shard_message_id": uuid.uuid4().hex,  # of this publish, not of the task
                "shard_sent_at": int(time.time()),  # pika knows no floats
            },
        ),
    )
    return task_id


def main() -> int:
    """Publish one event of each kind, in their order."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    order_id, kinds = int(sys.argv[1]), sys.argv[2:]
    parameters = pika.URLParameters(os.environ.get("BROKER_URL", "amqp://guest:guest@localhost/%2F"))
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()  # from here on, basic_publish returns when the broker has confirmed
        for kind in kinds:
            try:
                publish(channel, "shop.apply_event", str(order_id), order_id, kind)
            except (UnroutableError, NackError) as error:
                # Not stored. Later events would overtake it, so do not send them.
                print(f"{kind} was not stored: {error!r}", file=sys.stderr)
                return 1
            print(f"{kind} is stored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
