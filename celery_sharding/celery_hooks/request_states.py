"""What the worker's main process tells of a sharded run, by Celery's own code, and the ends that wait until it is told.

Most ends are told by the child that ran the task. Of a run that was lost, killed or revoked the main process tells, in
the thread of the states (`state_writer`), since the result backend may not answer. Where nothing else says what became
of a message, its end waits for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.worker.state import task_ready

from celery_sharding.celery_hooks.backend_errors import is_of_backend
from celery_sharding.celery_hooks.core import Delivery, Executor
from celery_sharding.dedup.waiting import STORE, WaitInLane, waits_for_store
from celery_sharding.texts import describe, text_of

if TYPE_CHECKING:
    # What is defined here stands before a request class of Celery's.
    from celery.worker.request import Request as _Stock
else:
    _Stock = object

UNTOLD_RUNS_MAX = 10
"""So often a run is tried whose end the result backend does not store."""


class StateTelling(_Stock):
    """Tells of the ends of a run.

    Attributes:
        delivery: The message as its shard delivered it; None: it came from an ordinary queue.
        executor: What started the run of a message from a shard.
        acknowledged: Celery's name: the message is settled, or was handed on to be.
        awaits_state: It leaves when its state is stored, or cannot be.
        has_left: This run was reported to the executor, or is an orphan that has ended: nothing is left to settle.
    """

    delivery: Delivery | None
    executor: Executor
    acknowledged: bool
    has_left = False
    awaits_state = False
    _killed = False
    _timed_out = False
    _teller: int | None = None  # the thread in which Celery's code tells of its end, which is settled
    _failure: BaseException | None = None

    @property
    def killed_pid(self) -> int | None:
        """The process that is being killed for this run; what follows in its lane waits until that has ended."""
        return self.worker_pid if self._killed else None

    def leave_by(self, report: Callable[..., object], *args: Any) -> None:
        """Report the end of this run to the executor; it has left when that did not fail."""
        report(self, *args)
        self.has_left = True

    def acknowledge(self) -> None:
        if self.delivery is None:
            super().acknowledge()
        elif self._teller == threading.get_ident():
            return  # Celery's code does it once more when it tells of an end that was settled before
        elif not self.acknowledged:
            self.acknowledged = True
            if self._failure is not None:
                # The text may hold a key, or data: it goes into the letter, and not into the journal.
                reason = f"failed: {type(self._failure).__name__}"
                self.leave_by(self.executor.failures.bury, reason, text_of(self._failure))
            elif self._killed:
                self.leave_by(self.executor.finish_when_gone)
            else:
                self.executor.finish(self)
                self.has_left = True
        elif self._killed and not self._timed_out:
            # It was asked to end, and has come to an end of its own instead: its process lives on.
            self.executor.leave(self)

    def reject(self, requeue: bool = False) -> None:
        if self.delivery is None:
            super().reject(requeue=requeue)
        elif self._teller == threading.get_ident():
            return
        elif not self.acknowledged:
            self.acknowledged = True
            if requeue:
                self.leave_by(self.executor.lose, "rejected with requeue")
            else:
                self.leave_by(self.executor.failures.bury, "rejected")
                self.send_event("task-rejected", requeue=False)

    def store_failure(self, reason: str) -> None:
        """Store FAILURE for a message that will not run again, and call the task's hooks; not now, in due course."""
        try:
            raise WorkerLostError(reason)
        except WorkerLostError:
            self._tell_failure(ExceptionInfo())

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        if self.delivery is None:
            super()._announce_cancelled(emit_retry=emit_retry)
            return
        task_ready(self)
        self._already_cancelled = True
        self._tell("RETRY", super()._announce_cancelled, emit_retry)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        stock = super()._announce_revoked
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
            self.executor.await_state(self, end)
            self._tell("REVOKED", stock, reason, terminated, signum, expired, then=end)

    def _end_revoked(self, reason: str, is_stored: bool) -> None:
        """End a message that was revoked, or has expired, before it began."""
        if self.has_left or self.delivery is None:
            return
        self.acknowledged = True
        if is_stored:
            self.leave_by(self.executor.finish)
        else:
            self.leave_by(self.executor.failures.bury, reason, "the result backend did not store it")

    def _end_untold(self, exc_info: Any, exc: BaseException) -> None:
        """End a run that left the pool by an error outside its body: the result backend failed it, for the most part.

        Nothing says what became of it. A claim knows whether its body has run, so one that waits for the claim store
        is tried again. Others stay in their lane until FAILURE is stored, or are dead letters if that cannot be.
        """
        assert self.delivery is not None
        delivery, text = self.delivery, describe(exc)
        task = self.task
        is_wanted = not (self._killed or self._already_revoked)
        if is_wanted and waits_for_store(task) and is_of_backend(exc_info.tb):
            delivery.untold_runs += 1
            if delivery.untold_runs < UNTOLD_RUNS_MAX:
                self.acknowledged = True
                self.leave_by(self.executor.wait, WaitInLane(STORE, text))
                return
        self.awaits_state = True
        end = partial(self._end_failed, exc)
        self.executor.await_state(self, end)
        self._tell("FAILURE", self._announce_failure, exc_info, False, then=end)

    def _end_failed(self, exc: BaseException, is_stored: bool) -> None:
        if self.has_left or self.delivery is None:
            return
        if is_stored or self.delivery.keeps_failures:
            self._settle_failure(exc, is_killed=False)
            return
        self.acknowledged = True
        self.executor.failures.note(self, exc)
        self.leave_by(self.executor.failures.bury, "its end could not be stored; its body may have run", text_of(exc))

    def _settle_failure(self, exc: BaseException, *, is_killed: bool) -> None:
        """End a run that has failed for good, as the settings of its group and its task say."""
        assert self.delivery is not None
        task = self.task
        is_timeout = isinstance(exc, TimeLimitExceeded)
        if is_killed:
            self._killed = self._timed_out = True
        if self.delivery.keeps_failures:
            self._failure = exc
        self.executor.failures.note(self, exc)
        if task.acks_on_timeout if is_timeout else task.acks_on_failure:
            self.acknowledge()
        else:
            self.reject(requeue=is_timeout)

    def _tell_failure(self, exc_info: Any, *, return_ok: bool = False) -> None:
        self._tell("FAILURE", self._announce_failure, exc_info, return_ok)

    def _announce_failure(self, exc_info: Any, return_ok: bool) -> None:
        """Do what Celery does of a failure of which no child could tell; in the thread of the states."""
        exc = cause_of(exc_info)
        if not isinstance(exc, WorkerLostError) and self._success_was_stored():
            return  # an earlier run's
        if isinstance(exc, MemoryError):
            # Celery raises it again, and tells nothing.
            try:
                raise WorkerLostError(describe(exc)) from exc
            except WorkerLostError:
                exc_info = ExceptionInfo()
        super().on_failure(exc_info, return_ok=return_ok)

    def _tell(self, state: str, call: Callable[..., object], *args: Any, **options: Any) -> None:
        assert self.delivery is not None

        def tell() -> None:
            self._teller = threading.get_ident()
            try:
                call(*args)
            finally:
                # Where lanes may be moved by any thread, what follows is called by this one.
                self._teller = None

        what = f"{state} of {self.name}[{self.id}]"
        self.executor.failures.states.tell(what, tell, **options)


def cause_of(exc_info: Any) -> BaseException:
    exc = exc_info.exception
    return exc.exc if isinstance(exc, ExceptionWithTraceback) else exc  # type: ignore[no-any-return]
