"""For tests of ordered tasks: an order checker, brokers and workers that can be killed, and broken networks."""

from __future__ import annotations

from celery_sharding.testing.cluster import RabbitCluster
from celery_sharding.testing.order import Trace, Verdict, check_order
from celery_sharding.testing.processes import ServerMissing, ServerNotReady
from celery_sharding.testing.proxy import Direction, FaultProxy
from celery_sharding.testing.rabbit_node import RabbitNode
from celery_sharding.testing.redis_node import RedisNode
from celery_sharding.testing.workers import WorkerNode

__all__ = [
    "Direction",
    "FaultProxy",
    "RabbitCluster",
    "RabbitNode",
    "RedisNode",
    "ServerMissing",
    "ServerNotReady",
    "Trace",
    "Verdict",
    "WorkerNode",
    "check_order",
]
