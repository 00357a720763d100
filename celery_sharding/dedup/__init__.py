"""Deduplication: `@deduplicate`, the claims that it keeps in the result backend, and the table for claims of yours."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from celery_sharding.dedup.decorator import deduplicate
from celery_sharding.dedup.running import Claim, current_claim

if TYPE_CHECKING:
    from celery_sharding.dedup.purging import purge_claims
    from celery_sharding.dedup.stores.schema import claim_metadata, claims_table

__all__ = ["Claim", "claim_metadata", "claims_table", "current_claim", "deduplicate", "purge_claims"]

_LAZY = {
    "claim_metadata": "celery_sharding.dedup.stores.schema",  # needs SQLAlchemy
    "claims_table": "celery_sharding.dedup.stores.schema",
    "purge_claims": "celery_sharding.dedup.purging",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
