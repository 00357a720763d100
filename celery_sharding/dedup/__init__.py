"""Deduplication: `@deduplicate`, the claims that it keeps in the result backend, and the table for claims of yours."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_sharding.dedup.decorator import deduplicate
    from celery_sharding.dedup.purging import purge_claims
    from celery_sharding.dedup.stores.schema import claim_metadata, claims_table
    from celery_sharding.dedup.task_claim import Claim, current_claim

__all__ = ["Claim", "claim_metadata", "claims_table", "current_claim", "deduplicate", "purge_claims"]

# Each is loaded when it is first used: the tables need SQLAlchemy, and a worker asks for `mark` alone.
_MODULES = {
    "Claim": "task_claim",
    "claim_metadata": "stores.schema",
    "claims_table": "stores.schema",
    "current_claim": "task_claim",
    "deduplicate": "decorator",
    "purge_claims": "purging",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
