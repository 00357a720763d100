"""`@deduplicate`: at most one run of a task's body per key commits.

The decorator wraps the function *under* `@app.task`, and leaves its options on the wrapper (`mark`), by which a worker
finds the tasks that need a store. Defining a task needs no app and no backend.

A direct call of the task, `apply_event(…)`, is a plain function call as always in Celery: no message, no claim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, cast, overload

from celery import current_task
from celery.app.task import Task
from celery.local import Proxy

from celery_sharding.config import KeyRule
from celery_sharding.dedup.body import Body
from celery_sharding.dedup.mark import ATTRIBUTE, dedup_options
from celery_sharding.dedup.options import Options
from celery_sharding.dedup.run import run_once
from celery_sharding.dedup.task_claim import current
from celery_sharding.errors import ConfigurationError, DeduplicationError

F = TypeVar("F", bound=Callable[..., Any])


@overload
def deduplicate(function: F, /) -> F: ...


@overload
def deduplicate(
    *,
    key: KeyRule | None = None,
    ttl_seconds: float = 86_400,
    lease_seconds: float = 60,
    on_running: Literal["wait", "retry", "skip"] = "wait",
    on_store_error: Literal["wait", "fail"] = "wait",
    remember_failures: bool = False,
    scope: str | None = None,
) -> Callable[[F], F]: ...


def deduplicate(
    function: Any = None,
    /,
    *,
    key: KeyRule | None = None,
    ttl_seconds: float = 86_400,
    lease_seconds: float = 60,
    on_running: Literal["wait", "retry", "skip"] = "wait",
    on_store_error: Literal["wait", "fail"] = "wait",
    remember_failures: bool = False,
    scope: str | None = None,
) -> Any:
    """Let one run per key commit; give the others its result. Works with and without parentheses.

    Args:
        function: The body of the task, if the decorator has no parentheses.
        key: The name of an argument, or a callable on the mapping of all arguments by name. None: the task id, which
            catches redelivered and re-sent messages of one call.
        ttl_seconds: How long the result is kept, and so how long duplicates are recognised.
        lease_seconds: How long a claim outlives a process that was lost. It is renewed while the task runs, however
            long that is.
        on_running: What a duplicate does while the first run goes on: "wait" for its result, "retry" the task
            when the lease would end, "skip" it (ignored, no state is written).
        on_store_error: "wait" until the store answers (a sharded task in its lane, without a slot), or "fail" the
            task. It never runs unclaimed.
        remember_failures: Keep a failure like a result: duplicates raise the same error. Otherwise they run again.
        scope: A name under which several tasks share their keys. None: the task's own name.

    Raises:
        ConfigurationError: An option is wrong, or the decorator stands above `@app.task`.
    """
    _check_rule(key)
    if isinstance(function, str) or getattr(function, "__name__", None) == "<lambda>":
        raise ConfigurationError("@deduplicate: give the key by name: key=…")
    options = Options(key, ttl_seconds, lease_seconds, on_running, on_store_error, remember_failures, scope)

    def decorate(function: F) -> F:
        _check_order(function)
        return cast(F, _wrap(Body(function, options)))

    return decorate if function is None else decorate(function)


def _wrap(body: Body) -> Any:
    function = body.function

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = args[0] if args and isinstance(args[0], Task) else None
        task = current_task._get_current_object() if bound is None else bound
        request = None if task is None else task.request
        if request is None or request.called_directly or not request.id:
            if current.get() is None:
                return function(*args, **kwargs)
            # Called from within another deduplicated task: that one's claim is not this function's.
            token = current.set(None)
            try:
                return function(*args, **kwargs)
            finally:
                current.reset(token)
        if bound is None:
            _check_carrier(task, body)
        return run_once(body, args, kwargs, task=task, request=request)

    setattr(run, ATTRIBUTE, body.options)
    return run


def _check_carrier(task: Task, body: Body) -> None:
    if dedup_options(task) is not body.options:
        raise DeduplicationError(
            f"{body.name} carries @deduplicate but is called inside the task {task.name} without being a task itself; "
            f"its claim would be that of {task.name}. (A decorator in between must use functools.wraps.) "
            f"{_right_order(body.name.rpartition('.')[2])}",
            task=task.name,
        )


def _check_order(function: Any) -> None:
    # By type, not isinstance: a lazy task would be evaluated, and its app finalized, by a look at its class.
    if issubclass(type(function), Task | Proxy):
        raise ConfigurationError(f"@deduplicate stands above @app.task; the order is: {_right_order('apply_event')}")
    if isinstance(function, type):
        raise ConfigurationError(
            f"@deduplicate is on the class {function.__name__}; put it on its method: "
            "@deduplicate(…) above def run(self, …)"
        )
    if not callable(function):
        raise ConfigurationError(f"@deduplicate takes a function, not {function!r}; write @deduplicate(…) above it")


def _check_rule(key: Any) -> None:
    if not inspect.isfunction(key):
        return
    try:
        inspect.signature(key).bind({})
    except TypeError as exc:
        raise ConfigurationError(
            f"@deduplicate: key={key.__qualname__} does not take the one mapping of arguments"
        ) from exc


def _right_order(name: str) -> str:
    return f"\n\n    @app.task\n    @deduplicate(…)\n    def {name}(…): ...\n"
