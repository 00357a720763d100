"""Tasks as Flower lists them, for its option `format_task`: with the shard, and with the key masked if wanted.

Flower passes what events say of a task, in Celery's own fields; none of them is a queue. So in the event of its start,
workers give the queue of a sharded task as its exchange, and here it becomes the shard. To see it, add the column:
`--tasks-columns=name,uuid,state,exchange,…`.
"""

from __future__ import annotations

import re
from typing import Any

from celery import current_app

from celery_sharding.flower.mount import mounted_sharding
from celery_sharding.topology import PREFIX

MASKED = "(masked)"
_QUEUE = re.compile(r"shards\.(?P<group>[^.]+)\.(?:g[0-9]+\.(?P<index>[0-9]+)|(?P<limbo>limbo[0-9]+))")


def format_task(task: Any) -> Any:
    """Return a task of Flower's with its shard, such as `orders/3`, as the exchange."""
    found = _QUEUE.fullmatch(str(task.exchange))
    if found is not None:
        task.exchange = f"{found['group']}/{found['limbo'] or int(found['index'])}"
    return task


def mask_task(task: Any) -> Any:
    """Return what `format_task` does, with the key and the arguments of a sharded task masked.

    Flower calls this for its pages only: its API, and the search in its list, show what events say.
    """
    if _may_be_sharded(task):
        task.args = task.kwargs = task.routing_key = MASKED
    return format_task(task)


def _may_be_sharded(task: Any) -> bool:
    """Say whether a task is sharded, or might be because nothing is known of it."""
    sharding = mounted_sharding() or getattr(current_app, "sharding", None)
    if sharding is None or not task.name or str(task.exchange).startswith(PREFIX):
        return True
    return bool(sharding.is_sharded(task.name))
