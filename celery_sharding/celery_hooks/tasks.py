"""The tasks of an app, without finalizing it where it must not be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery


def made_tasks(app: Celery) -> Mapping[str, Any]:
    """Return the tasks that are made so far; `app.tasks` would make them all."""
    found: Mapping[str, Any] = app._tasks
    return found


def find_task(app: Celery, name: str) -> Any | None:
    """Return the task of this name; None in a process that does not have it.

    Until an app is finalized, its tasks are not made, and nobody knows their names: one that is sent by its name would
    leave unsharded. Celery's `send_task` does not finalize; an app that must not be by itself is left alone.
    """
    task = made_tasks(app).get(name)
    if task is None and (app.finalized or app.autofinalize):
        app.finalize(auto=True)  # waits, if another thread has not finished it
        task = made_tasks(app).get(name)
    return task
