"""What the groups of a worker need of it: whether it stops, and the end of runs that have lost their messages."""

from __future__ import annotations

from celery_sharding.celery_hooks.pool import WorkerPool
from celery_sharding.celery_hooks.prefork import PreforkPool
from celery_sharding.worker.executor import Executor


class WorkerHost:
    """One worker.

    Args:
        children: None if the pool has none that can be killed.
    """

    def __init__(self, pool: WorkerPool, executor: Executor, children: PreforkPool | None) -> None:
        self._pool = pool
        self._executor = executor
        self._children = children

    @property
    def is_stopping(self) -> bool:
        """Whether nothing may be opened any more."""
        return self._pool.is_stopping

    def kill_orphans(self, *, is_flushed: bool = False) -> None:
        """End the runs in child processes whose messages are the broker's again; see `Executor.kill_orphans`."""
        if self._children is not None:
            self._executor.kill_orphans(self._children, is_flushed=is_flushed)
