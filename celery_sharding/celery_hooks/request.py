"""The request of a sharded run: Celery's own, with its endings led to the lanes.

Celery's request acknowledges, rejects, retries and fails as its task's settings say. For a message from a shard these
endings become one of five reports to the executor: finished, retry, wait, lost, dead. A request for a message from an
ordinary queue behaves as Celery's, although its class is the same: whether it is sharded is said by its delivery.

A run that is killed on purpose (revoke with terminate, a hard time limit) is acknowledged at once, as in Celery, but
its lane goes on only when the process that ran it has ended: otherwise the next task of the key could overlap it.

A run that waits for a thread when its channel is lost does not begin any more.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from celery.app.trace import logger as trace_logger
from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.utils.imports import symbol_by_name
from celery.worker.request import Request
from celery.worker.state import task_ready, task_reserved

from celery_sharding.celery_hooks.request_states import StateTelling, cause_of
from celery_sharding.celery_hooks.requests import DELIVERY
from celery_sharding.celery_hooks.retry import InPlaceRetry, keep_retries, retry_in_place
from celery_sharding.celery_hooks.site import WorkerSite
from celery_sharding.dedup.waiting import WaitInLane, hide_waits
from celery_sharding.errors import ClaimLost, DeduplicationError
from celery_sharding.texts import describe
from celery_sharding.wire import COMMIT, RUN_ATTRIBUTES, RUN_ID, SHARD_ATTRIBUTE

logger = logging.getLogger(__name__)

_LOST = WorkerLostError | SystemExit | KeyboardInterrupt


class NotBegun(Ignore):
    """Keeps a run from beginning whose message is the broker's again."""


class ShardRequestMixin(StateTelling):
    """Leads the endings of a run to the lanes if its message came from a shard.

    Attributes:
        is_cut_off: Its process was killed since the worker's main thread was blocked (`watchdog`).
        failed_starts: How often it could not be handed to the pool.
    """

    is_cut_off = False
    failed_starts = 0
    _is_elsewhere = False  # the broker has delivered it again

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self.delivery, self.executor = (message.delivery_info or {}).get(DELIVERY, (None, None))
        for name in RUN_ATTRIBUTES:
            self.request_dict.pop(name, None)
        if self.delivery is not None:
            self.request_dict[SHARD_ATTRIBUTE] = self.delivery.place.label

    def rebuild(
        self,
        *,
        retries: int,
        body: tuple[Any, Any] | None = None,
        time_limits: tuple[float | None, float | None] | None = None,
        wait: WaitInLane | None = None,
    ) -> Any:
        """Return a fresh request for the same message, for its next run; None: as it was.

        Args:
            wait: What its last run asked for, whose claim or commit the next one takes up.
        """
        headers = {**self.request_dict, "retries": retries}
        if time_limits is not None:
            headers["timelimit"] = list(time_limits)
        decoded = self.content_type is None
        payload = self.body
        if body is not None:
            embed = payload[2] if decoded else self.message.payload[2]
            payload, decoded = (*body, embed), True
        again = type(self)(
            self.message,
            on_ack=self.on_ack,
            on_reject=self.on_reject,
            hostname=self.hostname,
            eventer=self.eventer,
            app=self.app,
            connection_errors=self.connection_errors,
            task=self.task,
            body=payload,
            headers=headers,
            decoded=decoded,
            utc=self.utc,
        )
        if wait is not None:
            again.request_dict.update({RUN_ID: wait.run_id, COMMIT: wait.commit})
        return again

    def mark_reserved(self) -> None:
        """Let Celery count it as a task that the worker holds."""
        task_reserved(self)

    def mark_ready(self) -> None:
        """Let Celery count it as a task no more."""
        task_ready(self)

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002  # Celery's name
        if self.delivery is not None and self.eventer is not None and self.eventer.enabled:
            # Monitors know no field for a queue: Celery's of the exchange is seen in them (`flower.formatting`).
            fields |= {"shard": self.delivery.place.label, "exchange": self.delivery.place.queue}
        super().send_event(type, **fields)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        if self.delivery is None:
            super().on_accepted(pid, time_accepted)
            return
        # A child of a prefork pool has begun already; a thread begins after this.
        if pid == os.getpid() and self.delivery.is_orphan:
            self.executor.leave(self)
            self.has_left = True
            task_ready(self)
            raise NotBegun("its channel was lost before it began: the broker has delivered it again")
        try:
            super().on_accepted(pid, time_accepted)
        except NotImplementedError:
            # It was to be terminated before it began. Threads can't be killed: the run goes on to its own end.
            logger.warning("%s[%s] cannot be terminated in this pool", self.name, self.id)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if self.delivery is None or soft:
            super().on_timeout(soft, timeout)
            return
        if not self.has_left:
            # Of greenlets; a prefork pool has reported the same as a failure before, and kills the child after this.
            task_ready(self)
            if self.executor.settling.leave_orphan(self.delivery):
                self._is_elsewhere = self.has_left = True
            else:
                self._settle_failure(TimeLimitExceeded(timeout), is_killed=False)
        if not self._is_elsewhere:
            self._tell("FAILURE", super().on_timeout, soft, timeout)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        self._killed = True
        try:
            super().terminate(pool, signal)
        except NotImplementedError:
            # Threads can't be killed: the run goes on to its own end.
            self._killed = False
            raise

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        try:
            super().cancel(pool, signal, emit_retry=emit_retry)
        except NotImplementedError:
            if self.delivery is None:
                raise
            # A cold shutdown. Celery lets this error out of its signal handler: it would end the worker in the middle
            # of a shutdown or, on a solo pool, fail the task. The run goes on to its own end, and the worker waits.

    def on_retry(self, exc_info: Any) -> None:
        if self.delivery is None:
            super().on_retry(exc_info)
            return
        retry = cause_of(exc_info)
        if isinstance(retry, InPlaceRetry):
            self.acknowledged = True
            self.leave_by(self.executor.retry, retry)
            self.send_event("task-retried", exception=describe(retry.exc), traceback=str(exc_info.traceback))
        else:
            super().on_retry(exc_info)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        if self.delivery is None:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
            return
        task_ready(self)
        exc = cause_of(exc_info)
        if self.executor.settling.leave_orphan(self.delivery):
            self._is_elsewhere = self.has_left = True  # the broker has delivered the message again
        elif isinstance(exc, WaitInLane):
            self.acknowledged = True
            self.leave_by(self.executor.wait, exc)
        elif (self._already_cancelled and isinstance(exc, Terminated | _LOST)) or (
            self.is_cut_off and isinstance(exc, _LOST)
        ):
            # Celery would acknowledge one whose process was lost before it could be cancelled. One that was cut off
            # has lost its connection, though that may not be noticed yet: it is no lost attempt, nor a dead letter.
            self.leave_by(self.executor.abandon)
        elif self._is_lost(exc):
            self.leave_by(self.executor.lose, describe(exc))
        elif isinstance(exc, Reject):
            self.reject(requeue=exc.requeue)
            if not exc.requeue:
                self._tell_failure(exc_info, return_ok=return_ok)
        elif isinstance(exc, Retry | Ignore | Terminated):
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        elif not return_ok and not isinstance(exc, TimeLimitExceeded):
            self._end_untold(exc_info, exc)
        else:
            is_killed = isinstance(exc, TimeLimitExceeded) and self.worker_pid != os.getpid()
            if self._never_ran_and_says_nothing(exc):
                self._failure = exc
            self._settle_failure(exc, is_killed=is_killed)
            # A hard time limit is told by `on_timeout`, which the pool calls next; twice would call errbacks twice.
            if return_ok and not isinstance(exc, MemoryError):  # Celery raises it again, here in the main process
                super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _never_ran_and_says_nothing(self, exc: BaseException) -> bool:
        """Say whether the claim was not to be had, and the task keeps no results: only a dead letter can tell."""
        is_of_claim = isinstance(exc, DeduplicationError) and not isinstance(exc, ClaimLost)
        return is_of_claim and not self.store_errors

    def _is_lost(self, exc: BaseException) -> bool:
        """Say whether the process of the run died under it: not a failure of the task, and nobody asked for it."""
        return not getattr(self, "_already_revoked", False) and isinstance(exc, _LOST)


class ShardRequest(ShardRequestMixin, Request):
    """The request class of every sharded task that has no request class of its own."""


def adapt_tasks(site: WorkerSite) -> None:
    """Prepare the sharded tasks of a worker, before the pool forks; set on each task's instance.

    Late acknowledgement, the request class, and the in-place retry. Lost processes are counted by the lanes, so
    Celery's own ways to handle them are off.
    """
    hide_waits(trace_logger)
    keep_retries()
    for name in site.sharded:
        task = site.consumer.app.tasks[name]
        task.acks_late = True
        task.reject_on_worker_lost = False
        task.retry_on_worker_lost = False
        request_class = symbol_by_name(task.Request)
        if not issubclass(request_class, ShardRequestMixin):
            task.Request = (
                ShardRequest
                if request_class is Request
                else type(f"Shard{request_class.__name__}", (ShardRequestMixin, request_class), {})
            )
        task.retry = retry_in_place.__get__(task)
