"""What is wrong with a call in eager mode, which publishes nothing, but would be refused if it did."""

from __future__ import annotations

from typing import Any

from celery_sharding.publish.hook import refuse_broker, refuse_delay, refuse_router
from celery_sharding.publish.router import refuse_retry


def check_eager_call(sharding: Any, task: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
    """Raise what a publish of this call would raise. A retry keeps the key of the run that asked for it.

    Args:
        sharding: The `Sharding` of the task's app.
    """
    given = {name: value for name, value in options.items() if value is not None}
    is_sharded = sharding.rules.rule_for(task.name, task) is not None
    is_retry = is_sharded and bool(given.get("retries"))
    if is_retry:
        if "shard_key" in given:
            raise refuse_retry(task.name, "shard_key")
        given["shard_key"] = "retry"  # its arguments may be without one
    if is_sharded or any(name.startswith("shard") for name in given):
        task.app.amqp.router.route(dict(given), task.name, args, kwargs, task)
    if not is_sharded:
        return
    if (given.get("eta") or given.get("countdown")) and not is_retry:
        raise refuse_delay(task.name)
    if "router" in given or "route_name" in given:
        raise refuse_router(task.name)
    if "connection" in given and not sharding.is_own_broker(given["connection"]):
        raise refuse_broker(task.name)
