"""An error of ours that keeps `celery worker` from starting is one line, not a traceback with the line at its end.

Celery's command line shows a traceback for whatever `app.Worker(...)` raises: it makes the worker before it has a log.
So the app's `Worker` is called through here. Programs that start a worker themselves, such as
`celery.contrib.testing`, make a `WorkController`, and get the error. Read in Celery 5.7 (`celery.app.base`,
`celery.bin.worker`).
"""

from __future__ import annotations

import sys
from typing import Any

from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE

from celery_sharding.errors import ShardingError


def tell_start_errors(app: Any) -> None:
    """Let `celery worker` end with one line where a setting or an option of ours is wrong."""

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
