"""From the head of a lane into the pool: a run begins unless something speaks against it for the moment.

    starts ──▶ in the pool
      ▲  └───▶ held in its place, for so long:   the broker has shown no life lately    0.5 s
      │                     │                    its task's rate limit is used up       until it lets one through
      └────────due──────────┘                    Celery could not hand it over          1 s

What Celery could not hand over five times is a dead letter. What is held gives its slot to another lane.

Called by `Runs` and `Judge`, where lanes may be moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from celery_sharding.texts import describe
from celery_sharding.worker.redelivery.announcer import Announcements
from celery_sharding.worker.run.lanes import Entry, Lanes
from celery_sharding.worker.run.limits import Limits

logger = logging.getLogger(__name__)

_LIFE_SECONDS = 0.5
_PAUSE_SECONDS = 1.0
_STARTS_MAX = 5


class Submitter:
    """Hands the runs of one worker to its pool.

    Args:
        submit: Celery's way into the pool.
        call_after: Calls a function after some seconds, where lanes may be moved.
        bucket_for: Returns the rate-limit bucket of a task name, or None.
        is_alive: Says whether the broker has shown life lately.
        give_up: Makes a run that cannot begin a dead letter, told why.
    """

    def __init__(
        self,
        submit: Callable[[Any], Any],
        lanes: Lanes,
        announcements: Announcements,
        *,
        call_after: Callable[[float, Callable[[], None]], Any],
        bucket_for: Callable[[str], Any],
        is_alive: Callable[[], bool],
        give_up: Callable[[Any, str, str], None],
    ) -> None:
        self._submit = submit
        self._lanes = lanes
        self._announcements = announcements
        self._call_after = call_after
        self._limits = Limits(lanes, call_after=call_after, bucket_for=bucket_for)
        self._is_alive = is_alive
        self._give_up = give_up

    def begin(self, entry: Entry) -> None:
        """Hand a run to the pool, or hold it for a while."""
        request = entry.item
        if not self._is_alive():
            self.hold_for(entry, _LIFE_SECONDS)
        elif self._limits.let_through(entry):
            was_announced = request.delivery.is_counted = request.delivery.is_announced
            if was_announced:
                self._announcements.begun(request.delivery)  # before, since a solo pool runs the task in it
            request.delivery.note_start()
            try:
                self._submit(request)
            except Exception as exc:
                self._try_again(entry, exc, was_announced=was_announced)

    def _try_again(self, entry: Entry, exc: Exception, *, was_announced: bool) -> None:
        """Start a run later that could not be handed over, not for ever: what its message says may be the reason."""
        request = entry.item
        if request.has_left:
            logger.exception("%s[%s]: an error when it had left", request.name, request.id)
            return
        request.failed_starts += 1
        if request.failed_starts < _STARTS_MAX:
            logger.exception("%s[%s] could not be started, trying again", request.name, request.id)
            request.delivery.is_announced = was_announced
            self.hold_for(entry, _PAUSE_SECONDS)
        else:
            self._give_up(request, "could not be started", describe(exc))

    def hold_for(self, entry: Entry, seconds: float) -> None:
        """Keep an entry that was started in its place for some seconds, and start it again then."""
        if self._lanes.hold(entry):
            self._call_after(seconds, partial(self._lanes.due, entry))
