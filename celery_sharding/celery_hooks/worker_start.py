"""An error of ours that keeps `celery worker` from starting is one line, without a traceback above it.

Celery's command line shows a traceback for whatever `app.Worker(...)` raises, since it makes the worker before it sets
up logging. So the app's `Worker` is called through here. Programs that start a worker themselves, such as
`celery.contrib.testing`, make a `WorkController` and get the error.
"""

from __future__ import annotations

import sys
from typing import Any

from celery import Celery
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE

from celery_sharding.errors import ShardingError


def tell_start_errors(app: Celery) -> None:
    """Let `celery worker` end with one line if a setting or an option of ours is wrong."""

    def start_worker(*args: Any, **options: Any) -> Any:
        # The class is loaded when it is first asked for, and an app that starts no worker need not load it.
        vars(app).pop("Worker", None)
        try:
            return app.Worker(*args, **options)
        except ShardingError as exc:
            sys.stderr.write(f"Error: this worker does not start: {exc}\n")
            raise WorkerShutdown(EX_FAILURE) from exc
        finally:
            app.Worker = start_worker

    app.Worker = start_worker
