"""A forgotten `Sharding(app)`: workers and beat log a warning at start if a task of such an app names a group.

Nothing of ours runs in such an app. But Celery's command line, which starts workers and beat, loads our commands for
every app, so the check runs there.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import signals

logger = logging.getLogger(__name__)


def warn_of_forgotten() -> None:
    """Look at the app of each worker and beat that this process starts; once they have a log."""
    signals.celeryd_after_setup.connect(_look_at_worker)
    signals.beat_init.connect(_look_at_beat)


def _look_at_worker(instance: Any, **_: Any) -> None:
    _look(instance.app)


def _look_at_beat(sender: Any, **_: Any) -> None:
    _look(sender.app)


def _look(app: Any) -> None:
    if "sharding" in vars(app):
        return
    names = sorted(name for name, task in app.tasks.items() if getattr(task, "shard_group", None) is not None)
    if names:
        logger.warning(
            "these tasks have a shard_group, but app %r has no Sharding(app), so they run in no order: %s. Add "
            "Sharding(app, groups=[…]) beside the app, in every process that calls them, too",
            app.main,
            ", ".join(names),
        )
