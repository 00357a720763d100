"""How long a publish is tried again while the broker takes nothing.

An ordinary caller gets the error at once, and knows best what to do. What a worker publishes for a run has no such
caller: a link, the next step of a chain, the body of a chord, a replacement, a task called by a task. If it failed in a
short outage, the run would count as failed although its work is done. So it waits as long as
`task_publish_retry_policy` says, and at least 30 s. Nothing waits with `task_publish_retry` off, or `retry=False` in
the call.

The thread that consumes never waits: the worker would be taken for dead. It publishes for a run whose process was
killed, for example.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

from celery_sharding.celery_hooks.client import running_requests

PATIENCE_SECONDS_MIN = 30.0


def patience_seconds(conf: Any, options: Mapping[str, Any], *, consumer_thread: int | None) -> float:
    """Return how long the publish that is made now, in this thread, may be tried again; 0: not at all.

    Args:
        conf: Celery's configuration.
        options: Of the publish.
        consumer_thread: The thread that consumes, in the main process of a worker; else None.
    """
    retry = options.get("retry")
    if not (conf.task_publish_retry if retry is None else retry) or not _is_for_a_run(consumer_thread):
        return 0.0
    policy = {**(conf.task_publish_retry_policy or {}), **(options.get("retry_policy") or {})}
    return max(PATIENCE_SECONDS_MIN, _waits_seconds(**{name: policy[name] for name in _WAITS if name in policy}))


def _is_for_a_run(consumer_thread: int | None) -> bool:
    running = [request for request in running_requests() if not request.called_directly]
    if running:
        # Eager tasks run inside their caller, which may be a run.
        return not all(request.is_eager for request in running)
    return consumer_thread is not None and threading.get_ident() != consumer_thread


_WAITS = ("max_retries", "interval_start", "interval_step", "interval_max")


def _waits_seconds(
    max_retries: int | None = 3, interval_start: float = 0.0, interval_step: float = 0.2, interval_max: float = 0.2
) -> float:
    """Return how long a policy waits in all; 0 if it waits for ever, which Celery does not grant a worker either."""
    if max_retries is None:
        return 0.0
    rising = math.ceil(max(0.0, interval_max - interval_start) / interval_step) if interval_step > 0 else max_retries
    rising = min(rising, max_retries)
    waits = rising * interval_start + interval_step * rising * (rising - 1) / 2
    return waits + (max_retries - rising) * interval_max
