"""From the head of a lane into the pool: a run begins unless something speaks against it for the moment.

    starts ──▶ in the pool
      ▲  └───▶ held in its place, for so long:   the broker has shown no life lately    0.5 s
      │                     │                    its task's rate limit is used up       until it lets one through
      └────────due──────────┘                    Celery could not hand it over          1 s

What Celery could not hand over five times is a dead letter. What is held gives its slot to another lane.

Called by the executor, where lanes may be moved.
"""

from __future__ import annotations

import logging
from functools import partial

from celery_sharding.texts import describe
from celery_sharding.worker.ports import Clock, Pool
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.run.lanes import Lanes
from celery_sharding.worker.run.limits import Limits

logger = logging.getLogger(__name__)

_LIFE_SECONDS = 0.5
_PAUSE_SECONDS = 1.0
_STARTS_MAX = 5


class Submitter:
    """Hands the runs of one worker to its pool."""

    def __init__(self, pool: Pool, lanes: Lanes[Delivery], clock: Clock) -> None:
        self._pool = pool
        self._lanes = lanes
        self._clock = clock
        self._limits = Limits(lanes, pool, clock)

    def may_begin(self, delivery: Delivery) -> bool:
        """Say whether nothing speaks against a run for the moment; if something does, it is held for a while."""
        if self._pool.hears_broker():
            return self._limits.let_through(delivery)
        self.hold_for(delivery, _LIFE_SECONDS)
        return False

    def submit(self, delivery: Delivery) -> str | None:
        """Hand a run to the pool, now or, if that fails, soon; return why if it has failed too often.

        What its message says may be the reason.
        """
        request = delivery.request
        delivery.note_start()
        try:
            self._pool.submit(request)
        except Exception as exc:
            if request.has_left:
                logger.exception("%s[%s]: an error when it had left", request.name, request.id)
                return None
            request.failed_starts += 1
            if request.failed_starts >= _STARTS_MAX:
                return describe(exc)
            logger.exception("%s[%s] could not be started, trying again", request.name, request.id)
            if delivery.record is not None:
                delivery.record.put_back()
            self.hold_for(delivery, _PAUSE_SECONDS)
        return None

    def hold_for(self, delivery: Delivery, seconds: float) -> None:
        """Keep an entry that was started in its place for some seconds, and start it again then."""
        if self._lanes.hold(delivery):
            self._clock.call_after(seconds, partial(self._lanes.due, delivery))
