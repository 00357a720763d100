"""Where Celery's consumer hands on the requests that its strategies make, and cancels those that run."""

from __future__ import annotations

from typing import Any

from celery_sharding.celery_hooks.site import WorkerSite
from celery_sharding.wire import RUN_ATTRIBUTES

DELIVERY = "shard_delivery"
"""In the `delivery_info` of a message from a shard: its delivery, and the executor of its run."""


def take_requests(site: WorkerSite) -> None:
    """Leave the requests of shards to `site.requests`, and hand all others on. Before strategies are made."""
    stock = site.consumer.on_task_request

    def on_task_request(request: Any) -> Any:
        if DELIVERY in (request.message.delivery_info or ()):
            return site.requests.take_request(request)
        for attribute in RUN_ATTRIBUTES:
            # Handed on past our publishing hook: with it, a claim would wait in a lane that there is not.
            request.request_dict.pop(attribute, None)
        site.strays.note(request)
        return stock(request)

    site.consumer.on_task_request = on_task_request


def start_nothing_when_cancelling(site: WorkerSite) -> None:
    """Start nothing more before a cold shutdown ends what runs: it does so long before it calls `stop` of our step.

    It does it in a signal handler, in the middle of whatever the main thread does.
    """
    stock = site.consumer.cancel_active_requests

    def cancel_active_requests() -> Any:
        site.pool.stop()
        site.runs.stop()
        return stock()

    site.consumer.cancel_active_requests = cancel_active_requests
