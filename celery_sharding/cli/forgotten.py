"""A warning for apps whose tasks name a group but which have no `Sharding(app)`.

None of our code runs in such an app. But Celery's command line, which starts workers and beats, loads our commands for
every app, so the check is here.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import signals

logger = logging.getLogger(__name__)


def warn_of_forgotten() -> None:
    """Check the app of each worker and beat that this process starts, once they have a log."""
    signals.celeryd_after_setup.connect(_check_worker)
    signals.beat_init.connect(_check_beat)


def _check_worker(instance: Any, **_: Any) -> None:
    _check(instance.app)


def _check_beat(sender: Any, **_: Any) -> None:
    _check(sender.app)


def _check(app: Any) -> None:
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
