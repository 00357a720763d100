"""Ordered tasks for Celery on RabbitMQ: tasks of one key run one after the other, in the order they were published.

Importing this package opens no connection and loads no broker, backend or web library; the public names are loaded when
they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from celery_sharding.config import ShardGroup
from celery_sharding.errors import ShardingError

if TYPE_CHECKING:
    from celery_sharding.dedup import current_claim, deduplicate
    from celery_sharding.extension import Sharding

__version__ = "0.1.0.dev0"

__all__ = ["ShardGroup", "Sharding", "ShardingError", "current_claim", "deduplicate"]

_LAZY = {
    "Sharding": "celery_sharding.extension",
    "deduplicate": "celery_sharding.dedup",
    "current_claim": "celery_sharding.dedup",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
