"""Where Celery's `autodiscover_tasks` finds the task that deletes expired claims."""

from __future__ import annotations

from celery_sharding.dedup.tasks import purge_claims

__all__ = ["purge_claims"]
