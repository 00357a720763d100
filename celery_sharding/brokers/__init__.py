"""What stands behind the groups: RabbitMQ, or an embedded broker without a server."""

from __future__ import annotations

from celery_sharding.brokers.base import Backing
from celery_sharding.brokers.rabbitmq import RabbitBacking
from celery_sharding.errors import UnsupportedBroker
from celery_sharding.publish.message import Application


def open_backing(application: Application) -> Backing:
    """Return the backing that fits the transport of the broker's URL.

    Raises:
        UnsupportedBroker: The transport can't keep the order.
    """
    transport = application.connect().transport
    if transport.driver_type == "amqp":
        return RabbitBacking(application)
    if transport.driver_type in ("memory", "sql"):
        from celery_sharding.brokers.embedded import EmbeddedBacking

        return EmbeddedBacking(application)
    raise UnsupportedBroker(
        f"shard groups need RabbitMQ (amqp://); the transport {transport.driver_name!r} may requeue out of order. For "
        "tests and small installs memory:// and sqla+sqlite:// serve, with one worker"
    )
