"""The pool of one worker: its kind, the way into it, and what stands around a task in a solo pool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from celery_sharding.celery_hooks.heartbeats import is_silent
from celery_sharding.celery_hooks.site import WorkerSite

_PREFORK, _SOLO = "celery.concurrency.prefork", "celery.concurrency.solo"


class WorkerPool:
    """The pool of the worker of `consumer`, Celery's; made before the hooks are installed.

    Attributes:
        has_children: It runs tasks in processes of their own.
        is_green: It runs tasks in greenlets.
        is_solo: It runs tasks in the main thread.
        is_stopping: The worker stops, and nothing may start any more.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._submit = consumer.on_task_request
        controller = consumer.controller
        # The place in the pool that Celery takes for a run is not given back when the run cannot be handed over.
        takes_place = getattr(controller, "process_task", None) == controller._process_task_sem
        self._controller = controller if takes_place else None
        kind = type(consumer.pool).__module__
        self.has_children = kind == _PREFORK
        self.is_solo = kind == _SOLO
        self.is_green = bool(getattr(consumer.pool, "is_green", False))
        self.is_stopping = False

    def stop(self) -> None:
        """The worker stops: start nothing more."""
        self.is_stopping = True

    def submit(self, request: Any) -> None:
        """Hand a run to the pool by Celery's own way. An error gives the place back that was taken for it."""
        try:
            self._submit(request)
        except Exception:
            if self._controller is not None:
                self._controller._quick_release()
            raise

    def slots(self) -> int:
        """Return how many runs the pool takes: none once the worker stops, since its pool may be gone already.

        A worker that is told to stop while it has no connection stops its pool, and calls `stop` of no step of ours.
        """
        pool = self._consumer.pool
        return max(1, pool.num_processes) if pool.active and not self.is_stopping else 0

    def spawn(self, call: Callable[..., object], *args: Any) -> object:
        """Call in a greenlet of its own."""
        return self._consumer.pool.spawn_n(call, *args)

    def bucket_for(self, task_name: str) -> Any:
        """Return the rate-limit bucket of a task, or None; any thread may ask."""
        consumer = self._consumer
        return None if consumer.disable_rate_limits else consumer.task_buckets.get(task_name)

    def hears_broker(self) -> bool:
        """Say whether the broker was heard lately; an owner that is cut off must start nothing more."""
        return not is_silent(self._consumer.connection)


def surround_tasks(site: WorkerSite) -> None:
    """Let a solo pool run every task within `site.around_tasks`.

    `on_apply` is where a pool says how it runs a target. The solo pool keeps a function of its module there, which
    calls the target and then the callback.
    """
    if not site.pool.is_solo:
        return
    pool = site.consumer.pool
    stock = pool.on_apply

    def on_apply(target: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def run(*task_args: Any, **task_kwargs: Any) -> Any:
            with ExitStack() as stack:
                for each in site.around_tasks:
                    stack.enter_context(each)
                return target(*task_args, **task_kwargs)

        return stock(run, *args, **options)

    pool.on_apply = on_apply


def wait_for_no_slot(pool: Any) -> None:
    """Let nobody wait for a slot of `pool`, Celery's, on an embedded broker.

    Lanes move on in the thread that handles the pool's results. If that thread waited for a slot, which only it can
    free, a worker that also runs ordinary tasks would hang for ever. The lanes count their slots themselves.
    """
    pool.putlocks = False
