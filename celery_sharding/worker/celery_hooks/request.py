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
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.app.trace import logger as trace_logger
from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.utils.imports import symbol_by_name
from celery.worker.request import Request
from celery.worker.state import task_ready

from celery_sharding.dedup.waiting import STORE, WaitInLane, hide_waits, waits_for_store
from celery_sharding.errors import ClaimLost, DeduplicationError
from celery_sharding.texts import describe, text_of
from celery_sharding.wire import COMMIT, RUN_ATTRIBUTES, RUN_ID, SHARD_ATTRIBUTE
from celery_sharding.worker.run.retry import InPlaceRetry, keep_retries, retry_in_place
from celery_sharding.worker.run.state_writer import is_of_backend

if TYPE_CHECKING:
    from celery_sharding.publish.router import TaskRules
    from celery_sharding.worker.run.delivery import Delivery

logger = logging.getLogger(__name__)

DELIVERY = "shard_delivery"
UNTOLD_RUNS_MAX = 10
"""So often a run is tried whose end the result backend does not store."""
_LOST = WorkerLostError | SystemExit | KeyboardInterrupt


class NotBegun(Ignore):
    """Keeps a run from beginning whose message is the broker's again."""


class ShardRequestMixin:
    """Leads the endings of a run to the lanes if its message came from a shard.

    Attributes:
        delivery: The message as its shard delivered it; None: it came from an ordinary queue.
        acknowledged: Celery's name: the message is settled, or was handed on to be.
        is_cut_off: Its process was killed since the worker's main thread was blocked (`watchdog`).
        failed_starts: How often it could not be handed to the pool.
        awaits_state: It leaves when its state is stored, or cannot be.
        has_left: This run was reported to `Runs`, or is an orphan that has ended: nothing of it is left to settle.
    """

    acknowledged: bool
    has_left = False
    is_cut_off = False
    failed_starts = 0
    awaits_state = False
    _killed = False
    _timed_out = False
    _is_elsewhere = False  # the broker has delivered it again
    _teller: int | None = None  # the thread in which Celery's code tells of its end, which is settled
    _failure: BaseException | None = None

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)  # type: ignore[call-arg]
        self.delivery: Delivery | None = (message.delivery_info or {}).get(DELIVERY)
        for name in RUN_ATTRIBUTES:
            self.request_dict.pop(name, None)  # type: ignore[attr-defined]
        if self.delivery is not None:
            self.request_dict[SHARD_ATTRIBUTE] = self.delivery.label  # type: ignore[attr-defined]

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
        headers = {**self.request_dict, "retries": retries}  # type: ignore[attr-defined]
        if time_limits is not None:
            headers["timelimit"] = list(time_limits)
        decoded = self.content_type is None  # type: ignore[attr-defined]
        payload = self.body  # type: ignore[attr-defined]
        if body is not None:
            embed = payload[2] if decoded else self.message.payload[2]  # type: ignore[attr-defined]
            payload, decoded = (*body, embed), True
        again = type(self)(
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
        if wait is not None:
            again.request_dict.update({RUN_ID: wait.run_id, COMMIT: wait.commit})  # type: ignore[attr-defined]
        return again

    def store_failure(self, reason: str) -> None:
        """Store FAILURE for a message that will not run again, and call the task's hooks; not now, in due course."""
        try:
            raise WorkerLostError(reason)
        except WorkerLostError:
            self._tell_failure(ExceptionInfo())

    @property
    def killed_pid(self) -> int | None:
        """The process that is being killed for this run; what follows in its lane waits until that has ended."""
        return self.worker_pid if self._killed else None  # type: ignore[attr-defined]

    def leave_by(self, report: Callable[..., object], *args: Any) -> None:
        """Report the end of this run to `Runs`; it has left when that did not fail."""
        report(self, *args)
        self.has_left = True

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002  # Celery's name
        if self.delivery is not None:
            # Monitors know no field for a queue: Celery's of the exchange is seen in them (`flower.formatting`).
            fields |= {"shard": self.delivery.label, "exchange": self.delivery.shard.queue}
        super().send_event(type, **fields)  # type: ignore[misc]

    def acknowledge(self) -> None:
        if self.delivery is None:
            super().acknowledge()  # type: ignore[misc]
        elif self._teller == threading.get_ident():
            return  # Celery's code does it once more when it tells of an end that was settled before
        elif not self.acknowledged:
            self.acknowledged = True
            if self._failure is not None:
                # The text may hold a key, or data: it goes into the letter, and not into the journal.
                reason = f"failed: {type(self._failure).__name__}"
                self.leave_by(self.delivery.runs.bury, reason, text_of(self._failure))
            elif self._killed:
                self.leave_by(self.delivery.runs.finish_when_gone)
            else:
                self.leave_by(self.delivery.runs.finish)
        elif self._killed and not self._timed_out:
            # It was asked to end, and has come to an end of its own instead: its process lives on.
            self.delivery.runs.leave(self)

    def reject(self, requeue: bool = False) -> None:
        if self.delivery is None:
            super().reject(requeue=requeue)  # type: ignore[misc]
        elif self._teller == threading.get_ident():
            return
        elif not self.acknowledged:
            self.acknowledged = True
            if requeue:
                self.leave_by(self.delivery.runs.lose, "rejected with requeue")
            else:
                self.leave_by(self.delivery.runs.bury, "rejected")
                self.send_event("task-rejected", requeue=False)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        if self.delivery is None:
            super().on_accepted(pid, time_accepted)  # type: ignore[misc]
            return
        # A child of a prefork pool has begun already; a thread begins after this.
        if pid == os.getpid() and self.delivery.runs.leave_orphan(self.delivery):
            self.has_left = True
            task_ready(self)
            raise NotBegun("its channel was lost before it began: the broker has delivered it again")
        try:
            super().on_accepted(pid, time_accepted)  # type: ignore[misc]
        except NotImplementedError:
            # It was to be terminated before it began. Threads can't be killed: the run goes on to its own end.
            logger.warning("%s[%s] cannot be terminated in this pool", self.name, self.id)  # type: ignore[attr-defined]

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if self.delivery is None or soft:
            super().on_timeout(soft, timeout)  # type: ignore[misc]
            return
        if not self.has_left:
            # Of greenlets; a prefork pool has reported the same as a failure before, and kills the child after this.
            task_ready(self)
            if self.delivery.runs.leave_orphan(self.delivery):
                self._is_elsewhere = self.has_left = True
            else:
                self._settle_failure(TimeLimitExceeded(timeout), is_killed=False)
        if not self._is_elsewhere:
            self._tell("FAILURE", super().on_timeout, soft, timeout)  # type: ignore[misc]

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

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        if self.delivery is None:
            super()._announce_cancelled(emit_retry=emit_retry)  # type: ignore[misc]
            return
        task_ready(self)
        self._already_cancelled = True
        self._tell("RETRY", super()._announce_cancelled, emit_retry)  # type: ignore[misc]

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        stock = super()._announce_revoked  # type: ignore[misc]
        if self.delivery is None:
            stock(reason, terminated, signum, expired)
            return
        task_ready(self)
        self._already_revoked = True
        if terminated:
            self.acknowledge()
            self._tell("REVOKED", stock, reason, terminated, signum, expired)
        else:
            # It never began: until its state says so, nothing does.
            end = partial(self._end_revoked, reason)
            self.delivery.runs.await_state(self, end)
            self._tell("REVOKED", stock, reason, terminated, signum, expired, then=end)

    def _end_revoked(self, reason: str, is_stored: bool) -> None:
        """End a message that was revoked, or has expired, before it began."""
        if self.has_left or self.delivery is None:
            return
        self.acknowledged = True
        if is_stored:
            self.leave_by(self.delivery.runs.finish)
        else:
            self.leave_by(self.delivery.runs.bury, reason, "the result backend did not store it")

    def on_retry(self, exc_info: Any) -> None:
        if self.delivery is None:
            super().on_retry(exc_info)  # type: ignore[misc]
            return
        retry = _cause(exc_info)
        if isinstance(retry, InPlaceRetry):
            self.acknowledged = True
            self.leave_by(self.delivery.runs.retry, retry)
            self.send_event("task-retried", exception=describe(retry.exc), traceback=str(exc_info.traceback))
        else:
            super().on_retry(exc_info)  # type: ignore[misc]

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        if self.delivery is None:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)  # type: ignore[misc]
            return
        task_ready(self)
        exc = _cause(exc_info)
        if self.delivery.runs.leave_orphan(self.delivery):
            self._is_elsewhere = self.has_left = True  # the broker has delivered the message again
        elif isinstance(exc, WaitInLane):
            self.acknowledged = True
            self.leave_by(self.delivery.runs.wait, exc)
        elif (self._already_cancelled and isinstance(exc, Terminated | _LOST)) or (
            self.is_cut_off and isinstance(exc, _LOST)
        ):
            # Celery would acknowledge one whose process was lost before it could be cancelled. One that was cut off
            # has lost its connection, though that may not be noticed yet: it is no lost attempt, nor a dead letter.
            self.leave_by(self.delivery.runs.abandon)
        elif self._is_lost(exc):
            self.leave_by(self.delivery.runs.lose, describe(exc))
        elif isinstance(exc, Reject):
            self.reject(requeue=exc.requeue)
            if not exc.requeue:
                self._tell_failure(exc_info, return_ok=return_ok)
        elif isinstance(exc, Retry | Ignore | Terminated):
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)  # type: ignore[misc]
        elif not return_ok and not isinstance(exc, TimeLimitExceeded):
            self._end_untold(exc_info, exc)
        else:
            is_killed = isinstance(exc, TimeLimitExceeded) and self.worker_pid != os.getpid()  # type: ignore[attr-defined]
            if self._never_ran_and_says_nothing(exc):
                self._failure = exc
            self._settle_failure(exc, is_killed=is_killed)
            # A hard time limit is told by `on_timeout`, which the pool calls next; twice would call errbacks twice.
            if return_ok and not isinstance(exc, MemoryError):  # Celery raises it again, here in the main process
                super().on_failure(  # type: ignore[misc]
                    exc_info, send_failed_event=send_failed_event, return_ok=return_ok
                )

    def _never_ran_and_says_nothing(self, exc: BaseException) -> bool:
        """Say whether the claim was not to be had, and the task keeps no results: only a dead letter can tell."""
        is_of_claim = isinstance(exc, DeduplicationError) and not isinstance(exc, ClaimLost)
        return is_of_claim and not self.store_errors  # type: ignore[attr-defined]

    def _end_untold(self, exc_info: Any, exc: BaseException) -> None:
        """End a run that left the pool by an error outside its body: the result backend failed it, for the most part.

        Nothing says what became of it. A claim knows whether its body has run, so one that waits for the claim store
        is tried again. Others stay in their lane until FAILURE is stored, or are dead letters if that cannot be.
        """
        assert self.delivery is not None
        delivery, text = self.delivery, describe(exc)
        task = self.task  # type: ignore[attr-defined]
        is_wanted = not (self._killed or self._already_revoked)
        if is_wanted and waits_for_store(task) and is_of_backend(exc_info.tb):
            delivery.untold_runs += 1
            if delivery.untold_runs < UNTOLD_RUNS_MAX:
                self.acknowledged = True
                self.leave_by(delivery.runs.wait, WaitInLane(STORE, text))
                return
        self.awaits_state = True
        end = partial(self._end_failed, exc)
        delivery.runs.await_state(self, end)
        self._tell("FAILURE", self._announce_failure, exc_info, False, then=end)

    def _end_failed(self, exc: BaseException, is_stored: bool) -> None:
        if self.has_left or self.delivery is None:
            return
        if is_stored or self.delivery.keeps_failures:
            self._settle_failure(exc, is_killed=False)
            return
        self.acknowledged = True
        self.delivery.runs.note_failure(self, exc)
        self.leave_by(self.delivery.runs.bury, "its end could not be stored; its body may have run", text_of(exc))

    def _settle_failure(self, exc: BaseException, *, is_killed: bool) -> None:
        """End a run that has failed for good, as the settings of its group and its task say."""
        assert self.delivery is not None
        task = self.task  # type: ignore[attr-defined]
        is_timeout = isinstance(exc, TimeLimitExceeded)
        if is_killed:
            self._killed = self._timed_out = True
        if self.delivery.keeps_failures:
            self._failure = exc
        self.delivery.runs.note_failure(self, exc)
        if task.acks_on_timeout if is_timeout else task.acks_on_failure:
            self.acknowledge()
        else:
            self.reject(requeue=is_timeout)

    def _tell_failure(self, exc_info: Any, *, return_ok: bool = False) -> None:
        self._tell("FAILURE", self._announce_failure, exc_info, return_ok)

    def _announce_failure(self, exc_info: Any, return_ok: bool) -> None:
        """Do what Celery does of a failure of which no child could tell; in the thread of the states."""
        exc = _cause(exc_info)
        if not isinstance(exc, WorkerLostError) and self._success_was_stored():  # type: ignore[attr-defined]
            return  # an earlier run's
        if isinstance(exc, MemoryError):
            # Celery raises it again, and tells nothing.
            try:
                raise WorkerLostError(describe(exc)) from exc
            except WorkerLostError:
                exc_info = ExceptionInfo()
        super().on_failure(exc_info, return_ok=return_ok)  # type: ignore[misc]

    def _tell(self, state: str, call: Callable[..., object], *args: Any, **options: Any) -> None:
        assert self.delivery is not None

        def tell() -> None:
            self._teller = threading.get_ident()
            try:
                call(*args)
            finally:
                # Where lanes may be moved by any thread, what follows is called by this one.
                self._teller = None

        what = f"{state} of {self.name}[{self.id}]"  # type: ignore[attr-defined]
        self.delivery.runs.states.tell(what, tell, **options)

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
    keep_retries()
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
