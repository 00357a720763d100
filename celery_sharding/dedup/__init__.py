"""Deduplication: `@deduplicate`, the claims that it keeps in the result backend, and the table for claims of yours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery_sharding.dedup.decorator import deduplicate
from celery_sharding.dedup.running import Claim, current_claim

if TYPE_CHECKING:
    from celery_sharding.dedup.stores.schema import claim_metadata, claims_table

__all__ = ["Claim", "claim_metadata", "claims_table", "current_claim", "deduplicate"]


def __getattr__(name: str) -> Any:
    if name not in ("claim_metadata", "claims_table"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from celery_sharding.dedup.stores import schema  # needs SQLAlchemy

    return getattr(schema, name)
