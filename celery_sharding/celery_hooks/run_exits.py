"""The one way out of the pool: whatever happens when a run ends, it leaves its lane.

A pool reports a run to its request, by callbacks; the request reports to the executor. On this way user code runs
(receivers of signals, request classes, texts of exceptions), and anything may be raised. So every sharded run enters
the pool here, with its callbacks guarded:

    accepted   ── raises ──▶ logged; the run goes on: a child has begun it already, and so do the others
    the body   ── leaves by an error that the tracer did not catch, or by an exit ──▶ failed
    succeeded, failed, timed out
        ├─ waits for its state to be stored ──▶ leaves then
        ├─ has left: finished, held for its next run, a dead letter, abandoned ──▶ an error that came after is logged
        └─ has not ─┬─ its body came to its end ──▶ finished
                    └─ nobody can tell          ──▶ a dead letter, and FAILURE
                                └─ not even that ──▶ held, unacknowledged, until its shard is given up

So a slot and a key are never lost with a run, and no message is acknowledged of which nobody says what became of it.

A pool that runs tasks in threads or greenlets loses what leaves the body as an error (`apply_target` calls no callback
then, and hands an exit to the wrong one). A prefork pool reports both as failed; here all do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import WorkerLostError, WorkerShutdown, WorkerTerminate

from celery_sharding.celery_hooks.request import NotBegun, ShardRequestMixin
from celery_sharding.celery_hooks.site import WorkerSite
from celery_sharding.texts import describe

logger = logging.getLogger(__name__)

_UNKNOWN = "its end could not be handled"


def guard_exits(site: WorkerSite) -> None:
    """Let every sharded run enter Celery's pool with its way out guarded; before strategies are made."""
    pool = site.consumer.pool
    stock = pool.apply_async

    def apply_async(target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        request = getattr(options.get("callback"), "__self__", None)
        if isinstance(request, ShardRequestMixin) and request.delivery is not None:
            exit_ = Exit(request)
            options |= {
                "accept_callback": exit_.on_accepted,
                "callback": exit_.on_success,
                "error_callback": exit_.on_failure,
                "timeout_callback": exit_.on_timeout,
            }
            if not site.pool.has_children:
                target = _ReportingTarget(target, request)
        return stock(target, args, kwargs, **options)

    pool.apply_async = apply_async


@dataclass(frozen=True, slots=True)
class _ReportingTarget:
    """Runs a target and returns its error, as the pool's children report it."""

    target: Any
    request: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.target(*args, **kwargs)
        except BaseException as exc:
            if _is_stop(exc) or _is_time_limit(exc):
                raise
            if type(exc).__name__ != "GreenletExit":
                return ExceptionInfo()
            # A greenlet is killed by it, which Celery takes for success.
            if self.request.killed_pid is not None:
                raise
            return _lost(exc)


def _lost(exc: BaseException) -> ExceptionInfo:
    try:
        raise WorkerLostError(describe(exc)) from exc
    except WorkerLostError:
        return ExceptionInfo()


def _is_time_limit(exc: BaseException) -> bool:
    """Say whether it ends the task of a greenlet that has used up its time; Celery's pool waits for it."""
    return any(cls.__module__ == "gevent.timeout" for cls in type(exc).__mro__)


class Exit:
    """The guarded callbacks of one run in the pool."""

    __slots__ = ("_request",)

    def __init__(self, request: Any) -> None:
        self._request = request

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        try:
            self._request.on_accepted(pid, time_accepted)
        except NotBegun:
            raise
        except BaseException as exc:
            if _is_stop(exc):
                raise
            logger.error("%s: an error when it began: %s", self._name, describe(exc), exc_info=exc)

    def on_success(self, result: Any, **kwargs: Any) -> None:
        if isinstance(result, ExceptionInfo):
            self.on_failure(result)
            return
        self._leave(self._request.on_success, result, has_ended=not result[0], **kwargs)

    def on_failure(self, exc_info: Any, **kwargs: Any) -> None:
        self._leave(self._request.on_failure, exc_info, **kwargs)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if soft:
            self._request.on_timeout(soft, timeout)
        else:
            self._leave(self._request.on_timeout, soft, timeout)

    @property
    def _name(self) -> str:
        request = self._request
        return f"{request.delivery.place.label}: {request.name}[{request.id}]"

    def _leave(self, report: Callable[..., None], *args: Any, has_ended: bool = False, **kwargs: Any) -> None:
        error = None
        try:
            report(*args, **kwargs)
        except BaseException as exc:
            error = exc
        if error is not None:
            logger.error("%s: an error when it ended: %s", self._name, describe(error), exc_info=error)
        request = self._request
        if not request.has_left and not request.awaits_state:
            self._let_go(request, has_ended=has_ended, error=error)
        if error is not None and _is_stop(error):
            raise error

    def _let_go(self, request: Any, *, has_ended: bool, error: BaseException | None) -> None:
        """End a run that did not leave by itself."""
        executor, delivery = request.executor, request.delivery
        if not delivery.is_in_lane or executor.settling.leave_orphan(delivery):
            request.has_left = True
            return
        try:
            if has_ended:
                request.leave_by(executor.finish)
            else:
                text = "nothing was reported" if error is None else describe(error)
                executor.failures.give_up(request, _UNKNOWN, text)
        except Exception:
            logger.exception("%s: it cannot be ended, and stays unacknowledged", self._name)
            executor.abandon(request)


def _is_stop(exc: BaseException) -> bool:
    """Say whether the worker is told to stop: Celery raises these where it handles signals, in the main thread."""
    return isinstance(exc, WorkerShutdown | WorkerTerminate) and threading.current_thread() is threading.main_thread()
