"""Tasks as Flower lists them, for its option `format_task`: the shard, and no key if that is wanted.

Flower knows of a task what events said, and gives a copy of that which has Celery's own fields only; none is for a
queue. So workers name the queue of a sharded task as its exchange, from the event that says it has started, and here it
becomes the shard. To see it, name the column: `--tasks-columns=name,uuid,state,exchange,…`.
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
    """Return a task of Flower's with its shard, `orders/3`, as the exchange."""
    found = _QUEUE.fullmatch(str(task.exchange))
    if found is not None:
        task.exchange = f"{found['group']}/{found['limbo'] or int(found['index'])}"
    return task


def mask_task(task: Any) -> Any:
    """Return what `format_task` does, and mask the key of a sharded task, and the arguments of which it is one.

    Flower asks for this on its pages only: its API, and the search in its list, know what the events said.
    """
    if _may_be_sharded(task):
        task.args = task.kwargs = task.routing_key = MASKED
    return format_task(task)


def _may_be_sharded(task: Any) -> bool:
    """Say whether a task is sharded; one of which nothing is known may be."""
    sharding = mounted_sharding() or getattr(current_app, "sharding", None)
    if sharding is None or not task.name or str(task.exchange).startswith(PREFIX):
        return True
    return bool(sharding.is_sharded(task.name))
