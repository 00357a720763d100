"""Naming the errors of a result backend that Celery asks before it publishes.

With some backends (Redis, RPC) Celery subscribes to a task's result before it sends the task: `Celery.send_task` calls
`on_task_call` of the backend. If that fails, nothing was published, and the caller gets an error of the backend, which
looks like any other. For a sharded task it becomes `BackendUnavailable`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import Celery
from celery.utils import uuid

from celery_sharding.errors import BackendUnavailable, ShardingError

_ASKING = "on_task_call"
# Among the arguments of `send_task`: name, args, kwargs, countdown, eta, task_id.
_TASK_ID_PLACE = 5


def name_backend_errors(app: Celery) -> None:
    """Put the naming in front of the app's `send_task`, through which all publishes of tasks go."""
    sharding: Any = app.sharding
    # The application may have put one of its own onto the app. Else that of the class is looked up at each call, since
    # others may wrap it.
    own = vars(app).get("send_task")

    def send_task(*args: Any, **options: Any) -> Any:
        stock = partial(type(app).send_task, app) if own is None else own
        # Passed on as it is: a subclass of Celery may take other arguments, or fewer by position.
        name = args[0] if args else options.get("name")
        group = None if name is None else sharding.group_of(name)
        if group is None:
            return stock(*args, **options)
        task_id = args[_TASK_ID_PLACE] if len(args) > _TASK_ID_PLACE else options.get("task_id")
        if not task_id and len(args) <= _TASK_ID_PLACE:
            task_id = options["task_id"] = uuid()  # so that an error can name it
        try:
            return stock(*args, **options)
        except ShardingError:
            raise
        except Exception as exc:
            if not _was_asking(exc):
                raise
            raise BackendUnavailable(
                f"task {name}[{task_id}] of group {group!r} was not sent: the result backend, which Celery asks before "
                f"it publishes, failed with {type(exc).__name__} ({_line(exc)}); check result_backend, or set "
                "ignore_result=True where nobody reads the result",
                task_id=task_id,
                group=group,
            ) from exc

    app.send_task = send_task


def _was_asking(error: BaseException | None) -> bool:
    # Around it kombu raises an error of its own from what its transport knows as a lost connection: an OSError, mostly.
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_name == _ASKING:
                return True
            trace = trace.tb_next
        error = error.__cause__
    return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
