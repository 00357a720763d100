"""Retries that stay in place.

`self.retry` and `autoretry_for` of a sharded run publish nothing: they raise `InPlaceRetry`, which Celery carries from
the pool to the worker's main process as it carries every `Retry`; states and signals are Celery's. The lane holds the
message, waits, and runs the same request with `retries + 1`, so no later task of the key can pass.

A retry stands although its state cannot be stored, or a hook of the task raises when it is told of it: with Celery's
own the next run is published before that, and so this one, too, must not be lost by it (`keep_retries`).

A task called directly, eagerly or from an ordinary queue retries as Celery does.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.app.trace import TraceInfo
from celery.exceptions import Retry
from kombu.serialization import dumps, loads, prepare_accept_content, registry

from celery_sharding.errors import UnsupportedOption
from celery_sharding.journal.attempts import Attempt
from celery_sharding.publish.router import ordinary_retry, refuse_retry
from celery_sharding.texts import describe
from celery_sharding.wire import SHARD_ATTRIBUTE

logger = logging.getLogger(__name__)


class InPlaceRetry(Retry):
    """Asks the worker to run the message again.

    `body` is (args, kwargs), `time_limits` (hard, soft; seconds or None), if the retry changed them. A countdown counts
    from `asked_at`, by the clock that all processes of a machine share: not from when the worker hears of it.
    """

    def __init__(
        self,
        message: str | None = None,
        exc: Exception | None = None,
        when: float | datetime | None = None,
        body: tuple[Any, Any] | None = None,
        time_limits: tuple[float | None, float | None] | None = None,
        asked_at: float | None = None,
    ) -> None:
        super().__init__(message, exc, when)
        self.body = body
        self.time_limits = time_limits
        self.asked_at = time.monotonic() if asked_at is None else asked_at

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.exc, self.when, self.body, self.time_limits, self.asked_at)

    def seconds(self) -> float:
        """Return how long to wait from now."""
        if isinstance(self.when, datetime):
            when = self.when if self.when.tzinfo else self.when.replace(tzinfo=UTC)
            return max(0.0, (when - datetime.now(UTC)).total_seconds())
        seconds = self.asked_at + float(self.when or 0.0) - time.monotonic()
        return seconds if seconds > 0 or math.isnan(seconds) else 0.0


def retry_in_place(
    task: Any,
    args: Any = None,
    kwargs: Any = None,
    exc: Exception | None = None,
    throw: bool = True,
    eta: datetime | None = None,
    countdown: float | None = None,
    max_retries: int | None = None,
    **options: Any,
) -> Any:
    """Stand in for `Task.retry` on a sharded task; the parameters are Celery's.

    Raises:
        InPlaceRetry: The worker will run the task again.
        UnsupportedOption: A countdown beyond half the consumer time-out, or an option that would move the message.
        Exception: `exc`, or MaxRetriesExceededError, when the retries are used up.
    """
    request = task.request
    if request.called_directly or request.is_eager or not request.get(SHARD_ATTRIBUTE):
        with ordinary_retry():
            return type(task).retry(
                task, args, kwargs, exc, throw, eta=eta, countdown=countdown, max_retries=max_retries, **options
            )
    _refuse(task, options, throw)
    if max_retries is not None:
        task.override_max_retries = max_retries
    limit = task.max_retries if max_retries is None else max_retries
    if limit is not None and request.retries + 1 > limit:
        if exc is not None:
            raise exc
        raise task.MaxRetriesExceededError(
            f"Can't retry {task.name}[{request.id}] args:{request.args} kwargs:{request.kwargs}",
            task_args=request.args,
            task_kwargs=request.kwargs,
        )
    when = eta if eta is not None else (task.default_retry_delay if countdown is None else countdown)
    retry = InPlaceRetry(
        exc=exc, when=when, body=_changed_call(task, args, kwargs), time_limits=_changed_limits(request, options)
    )
    _refuse_long_wait(task, retry)
    raise retry


def keep_retries() -> None:
    """Let every retry in place of this process, and of its children, stand whatever fails when it is told.

    Celery's tracer makes an internal error of it, which hides the retry. Read of Celery 5.7.0.
    """
    stock = TraceInfo.handle_retry
    if hasattr(stock, "__wrapped__"):
        return

    def handle_retry(self: Any, task: Any, req: Any, *args: Any, **options: Any) -> Any:
        retry, traceback = self.retval, sys.exc_info()[2]
        try:
            return stock(self, task, req, *args, **options)
        except MemoryError:
            raise
        except Exception as exc:
            if not isinstance(retry, InPlaceRetry):
                raise
            logger.warning("%s[%s] is retried, though not all could be told: %s", task.name, req.id, describe(exc))
            return ExceptionInfo((type(retry), retry, traceback))

    handle_retry.__wrapped__ = stock  # type: ignore[attr-defined]
    TraceInfo.handle_retry = handle_retry


def encode_call(request: Any, call: tuple[Any, Any]) -> dict[str, Any]:
    """Return the (args, kwargs) of a changed retry as a body for the attempts stream."""
    serializer = request.task.serializer or request.app.conf.task_serializer
    if registry.name_to_type.get(serializer) not in _accepted(request):
        serializer = registry.type_to_name.get(request.message.content_type, serializer)
    content_type, content_encoding, body = dumps(call, serializer=serializer)
    return {
        "body": body if isinstance(body, bytes) else body.encode(),
        "content_type": content_type,
        "content_encoding": content_encoding,
    }


def decode_call(request: Any, known: Attempt) -> tuple[Any, Any]:
    """Return the (args, kwargs) that a retry under an earlier owner put in place of the message's own."""
    args, kwargs = loads(known.body, known.content_type, known.content_encoding, accept=_accepted(request))
    return tuple(args), dict(kwargs)


def _accepted(request: Any) -> set[str]:
    return prepare_accept_content(request.app.conf.accept_content)  # type: ignore[no-any-return]


def _refuse(task: Any, options: dict[str, Any], throw: bool) -> None:
    for option in options:
        if option not in ("time_limit", "soft_time_limit"):
            raise refuse_retry(task.name, option)
    if not throw:
        raise UnsupportedOption(
            f"task {task.name!r}: retry(throw=False) publishes the retry and goes on, but a sharded task is retried in "
            "its place; write `raise self.retry(…)`",
            task=task.name,
            option="throw",
        )


def _refuse_long_wait(task: Any, retry: InPlaceRetry) -> None:
    limit = task.app.sharding.settings.consumer_timeout_seconds / 2
    if not retry.seconds() <= limit:  # NaN is not
        raise UnsupportedOption(
            f"task {task.name!r}: a retry in {retry.seconds():.0f} s is longer than half the broker's consumer "
            "time-out, and the broker would take the shard away meanwhile. Retry sooner, or raise consumer_timeout on "
            "the broker and sharding_consumer_timeout_seconds here",
            task=task.name,
            option="countdown",
        )


def _changed_limits(request: Any, options: dict[str, Any]) -> tuple[float | None, float | None] | None:
    """Return the (hard, soft) time limits of the next run, None if they stay; what is not given is kept."""
    if not options:
        return None
    hard, soft = request.timelimit or (None, None)
    return options.get("time_limit", hard), options.get("soft_time_limit", soft)


def _changed_call(task: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Return the (args, kwargs) of the next run, None if they stay; what is not given is kept where it still fits."""
    request = task.request
    if args is None and kwargs is None:
        return None
    if args is not None and kwargs is not None:
        return tuple(args), dict(kwargs)
    parameters = list(inspect.signature(task.run).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if args is not None:
        taken = set(positional[: len(args)])
        return tuple(args), {name: value for name, value in request.kwargs.items() if name not in taken}
    kept = list(request.args)
    for position, name in enumerate(positional[: len(kept)]):
        if name in kwargs:
            kept[position] = kwargs[name]
    named = set(positional[: len(kept)])
    return tuple(kept), {
        **request.kwargs,
        **{name: value for name, value in kwargs.items() if name not in named},
    }
