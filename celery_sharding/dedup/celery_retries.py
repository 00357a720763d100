"""Celery's retries, as a deduplicated run meets them: how it retries itself, and how long a retry will take."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery_sharding.dedup.waiting import may_wait_in_lane


def retry_later(task: Any, seconds: float) -> None:
    """Retry the task of a duplicate in `seconds`, by raising `Retry`.

    It must not use up the retries of the task, and `retry` leaves the limit that it was given on the task, where
    autoretry would find it.
    """
    had_override = "override_max_retries" in vars(task)
    if may_wait_in_lane(task.request):
        # A retry in place may take half the consumer time-out; one that comes too early is repeated.
        seconds = min(seconds, task.app.sharding.settings.consumer_timeout_seconds / 4)
    try:
        raise task.retry(countdown=seconds, max_retries=(task.request.retries or 0) + 1)
    finally:
        if not had_override:
            vars(task).pop("override_max_retries", None)


def autoretry_seconds(task: Any, error: Exception) -> float | None:
    """Return the longest countdown with which Celery's autoretry will retry after `error`; None if it will not.

    `autoretry_for` acts around this wrapper (celery/app/autoretry.py), so its decision is predicted here.
    """
    if not hasattr(task, "_orig_run") or isinstance(error, tuple(getattr(task, "dont_autoretry_for", ()))):
        return None
    if not isinstance(error, tuple(getattr(task, "autoretry_for", ()))):
        return None
    options = getattr(task, "retry_kwargs", None) or {}
    limit = getattr(task, "override_max_retries", options.get("max_retries", task.max_retries))
    limit = task.max_retries if limit is None else limit
    retries = task.request.retries or 0
    if limit is not None and retries + 1 > limit:
        return None
    factor = float(getattr(task, "retry_backoff", False))
    if factor:
        return float(min(getattr(task, "retry_backoff_max", 600), max(1.0, factor) * 2 ** min(retries, 32)))
    countdown = options.get("countdown")
    return float(task.default_retry_delay if countdown is None else countdown)


def seconds_until(when: Any, app: Any) -> float:
    """Return the seconds until the moment of a `Retry`, which is a datetime or a countdown."""
    if isinstance(when, datetime):
        now = app.now() if when.tzinfo is not None else app.now().replace(tzinfo=None)
        return max(0.0, float((when - now).total_seconds()))
    return float(when or 0)
