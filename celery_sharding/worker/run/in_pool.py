"""The runs that a pool of processes has, of which some may have lost their messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery_sharding.worker.run.delivery import Delivery, State
from celery_sharding.worker.run.lanes import Lanes

logger = logging.getLogger(__name__)


def has_unaccepted(lanes: Lanes[Delivery]) -> bool:
    """Say whether runs were handed to the pool that no process of it has begun, as far as is known."""
    return any(run.request.time_start is None and not run.request.is_cut_off for run in lanes.in_pool())


def running(lanes: Lanes[Delivery]) -> list[Any]:
    """Return the requests that a process of the pool runs, or may begin any moment."""
    requests = [run.request for run in lanes.in_pool()]  # None: it has just ended, in another thread
    return [each for each in requests if each is not None and (not each.has_left or each.killed_pid is not None)]


def release_orphans(lanes: Lanes[Delivery], kill: Callable[[int], None], *, is_flushed: bool) -> None:
    """End what runs without a message, so that its redelivery does not overlap it.

    A run that has begun is killed; its lane stays locked until it has ended, as it does in the other pools.

    Args:
        is_flushed: The pool has forgotten what no process had accepted, as Celery makes it when the connection is lost.
            Else such a run is still to begin, and comes to its own end.
    """
    for run in lanes.in_pool():
        request = run.request
        if run.state is not State.ORPHAN:
            continue
        if request.has_left and request.killed_pid is None:
            continue  # it has ended, and waits for what is written of it; its process runs something else
        if request.time_start is not None:
            logger.warning("killing the run of %s[%s]: its shard's channel was lost", request.name, request.id)
            kill(request.worker_pid)
        elif is_flushed:
            lanes.settle(run)
