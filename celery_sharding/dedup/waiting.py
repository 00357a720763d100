"""How a run asks to wait in its lane: before its body has begun, or when only its commit is left.

A sharded run whose claim store does not answer, or whose claim another run holds, gives its slot back and keeps its
place: the wrapper raises `WaitInLane`, which Celery's tracer lets pass like every `Ignore` (no state, no retry), and
the worker tries again later (`worker.run.waits`). This is neither a retry nor an attempt. If only the commit is left,
the next try does only that.

A run that is not sharded has no lane, and waits in its slot.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery.exceptions import Ignore

from celery_sharding.dedup.mark import dedup_options
from celery_sharding.wire import SHARD_ATTRIBUTE

STORE, CLAIM = "store", "claim"


class WaitInLane(Ignore):
    """Try the message again later, in its place.

    It waits for `what`, `STORE` or `CLAIM`, at most `at_most_seconds` if that is known. It may have claimed under the
    token `run_id`. `commit` is what is left to be committed, None if the task has not run.
    """

    def __init__(
        self,
        what: str,
        reason: str,
        *,
        at_most_seconds: float | None = None,
        run_id: str | None = None,
        commit: tuple[bytes, bool] | None = None,
    ) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason
        self.at_most_seconds = at_most_seconds
        self.run_id = run_id
        self.commit = commit

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(type(self), at_most_seconds=self.at_most_seconds, run_id=self.run_id, commit=self.commit)
        return make, (self.what, self.reason)


def may_wait_in_lane(request: Any) -> bool:
    """Say whether a run has a lane to wait in. `request` is `task.request`."""
    # The shard is what `celery_hooks.request` puts into the headers of a sharded run.
    return not request.is_eager and bool(request.get(SHARD_ATTRIBUTE))


def waits_for_store(task: Any) -> bool:
    """Say whether runs of `task` wait while the claim store does not answer."""
    options = dedup_options(task)
    return options is not None and options.on_store_error == "wait"


def hide_waits(logger: logging.Logger) -> None:
    """Keep Celery's tracer from logging each try of a run that waits: the worker logs what matters."""
    if _is_other not in logger.filters:
        logger.addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    # The tracer logs an ignored run with its error as text (`TraceInfo._log_error`, read in Celery 5.7.0).
    found = record.args.get("exc") if isinstance(record.args, dict) else None
    return not (isinstance(found, str) and found.startswith(f"{WaitInLane.__name__}("))
