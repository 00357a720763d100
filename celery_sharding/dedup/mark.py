"""The mark that `@deduplicate` leaves on the body of a task. Imports nothing: every worker start asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_sharding.dedup.options import Options

ATTRIBUTE = "__deduplicate__"


def dedup_options(task: Any) -> Options | None:
    """Return the options of a task's `@deduplicate`, None if its body does not carry it."""
    options: Options | None = getattr(task.run, ATTRIBUTE, None)
    return options


def is_deduplicated(task: Any) -> bool:
    return dedup_options(task) is not None


def deduplicated_tasks(app: Any) -> list[str]:
    """Return the names of the deduplicated tasks of a finalized app, sorted."""
    return sorted(name for name, task in app.tasks.items() if is_deduplicated(task))
