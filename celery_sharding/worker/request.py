"""The request of a sharded run: Celery's own, with its endings led to the lanes.

Celery's request acknowledges, rejects, retries and fails as its task's settings say. For a message from a shard these
endings become one of five reports to `Runs`: finished, retry, wait, lost, dead. A request for a message from an
ordinary queue behaves as Celery's, although its class is the same: whether it is sharded is said by its delivery.

A run that is killed on purpose (revoke with terminate, a hard time limit) is acknowledged at once, as in Celery, but
its lane goes on only when the process that ran it has ended: otherwise the next task of the key could overlap it.

A run that waits for a thread when its channel is lost does not begin any more.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.app.trace import logger as trace_logger
from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.utils.imports import symbol_by_name
from celery.worker.request import Request
from celery.worker.state import task_ready

from celery_sharding.dedup.waiting import ASKS_STORE, RUN_ID, WaitInLane, hide_waits
from celery_sharding.worker.retry import SHARD_ATTRIBUTE, InPlaceRetry, retry_in_place

if TYPE_CHECKING:
    from celery_sharding.routing import TaskRules
    from celery_sharding.worker.delivery import Delivery

logger = logging.getLogger(__name__)

DELIVERY = "shard_delivery"
_LOST = WorkerLostError | SystemExit | KeyboardInterrupt


class ShardRequestMixin:
    """Leads the endings of a run to the lanes if its message came from a shard."""

    _killed = False
    _timed_out = False
    _failure: BaseException | None = None

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)  # type: ignore[call-arg]
        self.delivery: Delivery | None = (message.delivery_info or {}).get(DELIVERY)
        if self.delivery is not None:
            self.request_dict[SHARD_ATTRIBUTE] = self.delivery.label  # type: ignore[attr-defined]

    def rebuild(
        self,
        *,
        retries: int,
        body: tuple[Any, Any] | None = None,
        time_limits: tuple[float | None, float | None] | None = None,
        run_id: str | None = None,
    ) -> Any:
        """Return a fresh request for the same message, for its next run; None: as it was.

        Args:
            run_id: Under which its next run is to claim; None: under one of its own.
        """
        headers = {**self.request_dict, "retries": retries, RUN_ID: run_id, ASKS_STORE: False}  # type: ignore[attr-defined]
        if time_limits is not None:
            headers["timelimit"] = list(time_limits)
        decoded = self.content_type is None  # type: ignore[attr-defined]
        payload = self.body  # type: ignore[attr-defined]
        if body is not None:
            embed = payload[2] if decoded else self.message.payload[2]  # type: ignore[attr-defined]
            payload, decoded = (*body, embed), True
        return type(self)(
            self.message,  # type: ignore[attr-defined]
            on_ack=self.on_ack,  # type: ignore[attr-defined]
            on_reject=self.on_reject,  # type: ignore[attr-defined]
            hostname=self.hostname,  # type: ignore[attr-defined]
            eventer=self.eventer,  # type: ignore[attr-defined]
            app=self.app,  # type: ignore[attr-defined]
            connection_errors=self.connection_errors,  # type: ignore[attr-defined]
            task=self.task,  # type: ignore[attr-defined]
            body=payload,
            headers=headers,
            decoded=decoded,
            utc=self.utc,  # type: ignore[attr-defined]
        )

    def store_failure(self, reason: str) -> None:
        """Store FAILURE for a message that will not run again, and call the task's hooks."""
        self.acknowledged = True
        try:
            raise WorkerLostError(reason)
        except WorkerLostError:
            super().on_failure(ExceptionInfo())  # type: ignore[misc]

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002  # Celery's name
        if self.delivery is not None:
            # Monitors know no field for a queue: Celery's of the exchange is seen in them (`flower.formatting`).
            fields |= {"shard": self.delivery.label, "exchange": self.delivery.shard.queue}
        super().send_event(type, **fields)  # type: ignore[misc]

    def acknowledge(self) -> None:
        if self.delivery is None:
            super().acknowledge()  # type: ignore[misc]
        elif not self.acknowledged:
            self.acknowledged = True
            if self._failure is not None:
                # The text may hold a key, or data: it goes into the letter, and not into the journal.
                reason = f"failed: {type(self._failure).__name__}"
                self.delivery.runs.bury(self, reason, str(self._failure))
            elif self._killed:
                self.delivery.runs.finish_when_gone(self, self.worker_pid)  # type: ignore[attr-defined]
            else:
                self.delivery.runs.finish(self)
        elif self._killed and not self._timed_out:
            # It was asked to end, and has come to an end of its own instead: its process lives on.
            self.delivery.runs.leave(self)

    def reject(self, requeue: bool = False) -> None:
        if self.delivery is None:
            super().reject(requeue=requeue)  # type: ignore[misc]
        elif not self.acknowledged:
            self.acknowledged = True
            if requeue:
                self.delivery.runs.lose(self, "rejected with requeue")
            else:
                self.delivery.runs.bury(self, "rejected")
                self.send_event("task-rejected", requeue=False)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        if self.delivery is None:
            super().on_accepted(pid, time_accepted)  # type: ignore[misc]
            return
        # A child of a prefork pool has begun already; a thread begins after this.
        if pid == os.getpid() and self.delivery.runs.leave_orphan(self.delivery):
            task_ready(self)
            raise Ignore("its channel was lost before it began: the broker has delivered it again")
        try:
            super().on_accepted(pid, time_accepted)  # type: ignore[misc]
        except NotImplementedError:
            # It was to be terminated before it began. Threads can't be killed: the run goes on to its own end.
            logger.warning("%s[%s] cannot be terminated in this pool", self.name, self.id)  # type: ignore[attr-defined]

    def terminate(self, pool: Any, signal: Any = None) -> None:
        self._killed = True
        try:
            super().terminate(pool, signal)  # type: ignore[misc]
        except NotImplementedError:
            # Threads can't be killed: the run goes on to its own end.
            self._killed = False
            raise

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        try:
            super().cancel(pool, signal, emit_retry=emit_retry)  # type: ignore[misc]
        except NotImplementedError:
            if self.delivery is None:
                raise
            # A cold shutdown. Celery lets this error out of its signal handler: it would end the worker in the middle
            # of a shutdown or, on a solo pool, fail the task. The run goes on to its own end, and the worker waits.

    def on_retry(self, exc_info: Any) -> None:
        if self.delivery is None:
            super().on_retry(exc_info)  # type: ignore[misc]
            return
        retry = _cause(exc_info)
        if isinstance(retry, InPlaceRetry):
            self.acknowledged = True
            self.delivery.runs.retry(self, retry)
            self.send_event("task-retried", exception=repr(retry.exc), traceback=str(exc_info.traceback))
        else:
            super().on_retry(exc_info)  # type: ignore[misc]

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        if self.delivery is None:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)  # type: ignore[misc]
            return
        exc = _cause(exc_info)
        if self.delivery.runs.leave_orphan(self.delivery):
            task_ready(self)  # the broker has delivered the message again
            return
        if isinstance(exc, WaitInLane):
            task_ready(self)
            self.acknowledged = True
            self.delivery.runs.wait(self, exc)
            return
        if self._already_cancelled and isinstance(exc, Terminated | _LOST):  # type: ignore[attr-defined]
            # Celery would acknowledge one whose process was lost before it could be cancelled.
            task_ready(self)
            self.delivery.runs.abandon(self)
            return
        if self._is_lost(exc):
            task_ready(self)
            if self.delivery.runs.lose(self, repr(exc)):
                return
            self.acknowledged = True  # it is a dead letter now; what follows stores the failure and calls the hooks
        elif isinstance(exc, TimeLimitExceeded) and self.worker_pid != os.getpid():  # type: ignore[attr-defined]
            self._killed = self._timed_out = True
        if self.delivery.keeps_failures and not isinstance(exc, Retry | Ignore | Reject | Terminated):
            self._failure = exc
        try:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)  # type: ignore[misc]
        except MemoryError:
            # Celery raises the task's MemoryError again, here in the main process, and settles nothing.
            self.acknowledge()
        if not isinstance(exc, Retry | Ignore | Reject | Terminated):
            self.delivery.runs.note_failure(self, exc)

    def _is_lost(self, exc: BaseException) -> bool:
        """Say whether the process of the run died under it: not a failure of the task, and nobody asked for it."""
        return not getattr(self, "_already_revoked", False) and isinstance(exc, _LOST)


class ShardRequest(ShardRequestMixin, Request):
    """The request class of every sharded task that has no request class of its own."""


def install(app: Any, rules: TaskRules) -> dict[str, str]:
    """Prepare every sharded task of `app` for this worker; return task name → group name.

    Set on the task's instance, before the pool forks: late acknowledgement, the request class, and the in-place retry.
    Lost processes are counted by the lanes, so Celery's own ways to handle them are off.

    Raises:
        ShardingError: A task's options contradict each other.
    """
    hide_waits(trace_logger)
    sharded = {}
    for name, task in app.tasks.items():
        rule = rules.rule_for(name, task)
        if rule is None:
            continue
        sharded[name] = rule.group.name
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
    return sharded


def _cause(exc_info: Any) -> BaseException:
    exc = exc_info.exception
    return exc.exc if isinstance(exc, ExceptionWithTraceback) else exc  # type: ignore[no-any-return]
