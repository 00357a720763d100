"""Tasks as Flower lists them, for its option `format_task`: the shard, and no key if that is wanted.

Flower gives a copy of what it knows of a task. Workers name the shard in the events of a sharded task, from the one
that says it has started. Flower has no column for it, so it takes the place of the exchange, which says nothing more
of a sharded task: `--tasks-columns=name,uuid,state,exchange,…`.
"""

from __future__ import annotations

from typing import Any

from celery import current_app

from celery_sharding.flower.mount import mounted_sharding

MASKED = "(masked)"


def format_task(task: Any) -> Any:
    """Return a task of Flower's with its shard, `orders/3`, as the exchange."""
    shard = getattr(task, "shard", None)
    if shard is not None:
        task.exchange = shard
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
    if getattr(task, "shard", None) is not None or sharding is None or not task.name:
        return True
    return bool(sharding.is_sharded(task.name))
