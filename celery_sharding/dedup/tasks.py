"""A task for beat that deletes expired claims. Import this module in your app, or add it to the setting `imports`."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from celery_sharding.dedup.purging import purge_expired


@shared_task(bind=True, name="celery_sharding.purge_claims", ignore_result=True)  # type: ignore[untyped-decorator]
def purge_claims(task: Any) -> int:
    """Delete expired claims and return how many; see `purging.purge_expired`."""
    return purge_expired(task.app)
