"""Calls in eager mode, refused like those that are published.

Under `task_always_eager`, by `task.apply()`, and in chains, groups and chords of either, Celery runs a task where it is
called: no message is built, and no router is asked. What is wrong with a call would be found in production only. So
`apply`, through which all of them go, asks the router first: a missing key, an unknown group, eta, priority, a queue of
the caller's own raise what they raise elsewhere, at the caller. Nothing is published; then Celery runs the task.

`apply` is replaced in the class of each task. Celery lets `task_annotations` do that when it binds a task to its app,
and asks `app.annotations` for them. The configuration is read when Celery reads it, and no task is made for it. Tasks
that are bound already are changed at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from celery import Celery
from celery.app.annotations import prepare, resolve_all

from celery_sharding.celery_hooks.tasks import made_tasks
from celery_sharding.publish.eager import check_eager_call


def check_eager_calls(app: Celery) -> None:
    """Let the tasks of an app that has a `Sharding` check calls in eager mode, those to come included."""
    for task in made_tasks(app).values():
        cls = type(task)
        cls.apply = _checked(cls.apply)
    app.annotations = _Annotations(app)


class _Annotations:
    """Stands in for `app.annotations`: what the application annotates, and `apply`."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    @cached_property
    def _own(self) -> list[Any]:
        return list(prepare(self._app.conf.task_annotations))

    def __iter__(self) -> Iterator[_Annotations]:
        yield self

    def annotate(self, task: Any) -> dict[str, Any]:
        """Return what is to be set on a task's class. Celery takes one answer of all annotations, so this gives all."""
        found: dict[str, Any] = {}
        for each in resolve_all(self._own, task):
            found |= each
        around = found.pop("@apply", None)
        apply = found.get("apply", task.apply)
        found["apply"] = _checked(apply if around is None else around(apply))
        return found

    def annotate_any(self) -> None:
        """Nothing: `annotate` has said it."""


def _checked(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Task.apply` with our checks in front; one that has them, or is not Celery's, is returned as it is."""
    if hasattr(apply, "checks_sharding") or not _is_celerys(apply):
        return apply

    @functools.wraps(apply)
    def checked(self: Any, *given: Any, **options: Any) -> Any:
        sharding = vars(self.app).get("sharding")
        if sharding is not None:
            call = {**dict(zip(("args", "kwargs"), given, strict=False)), **options}
            args, kwargs = call.pop("args", None), call.pop("kwargs", None)
            check_eager_call(sharding, self, args or (), kwargs or {}, call)
        return apply(self, *given, **options)

    del checked.__wrapped__  # Celery's `Task.add_around` takes off what has it
    checked.checks_sharding = True  # type: ignore[attr-defined]
    return checked


def _is_celerys(apply: Any) -> bool:
    """Say whether this is Celery's `Task.apply`, or takes its place: a task may have a method of its own of that name.

    Outside of eager mode Celery never calls it, so such a method goes unnoticed there.
    """
    function = inspect.unwrap(apply) if inspect.isfunction(apply) else None
    if not inspect.isfunction(function):
        return False
    # Not its signature, which may evaluate annotations that stand for type checkers only.
    code = function.__code__
    takes_anything = bool(code.co_flags & inspect.CO_VARARGS and code.co_flags & inspect.CO_VARKEYWORDS)
    return takes_anything or {"args", "kwargs"} <= set(code.co_varnames[: code.co_argcount])
