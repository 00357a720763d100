"""What becomes of messages that fail for good: the journal hears of it, and some become dead letters.

A dead letter is confirmed before its message is acknowledged, so a kill between the two repeats it and loses nothing.
Whoever has a request stores its state; for a message that never became one, that is done here.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery.exceptions import WorkerLostError

from celery_sharding.errors import DeadLettered
from celery_sharding.journal.events import TaskFailed
from celery_sharding.texts import describe
from celery_sharding.worker.log import Log, Refusal
from celery_sharding.worker.run.dead_letter import DeadLetter
from celery_sharding.worker.run.dead_states import tell_dead
from celery_sharding.worker.run.delivery import Delivery, State
from celery_sharding.worker.run.lanes import Lanes
from celery_sharding.worker.run.settling import Settling
from celery_sharding.worker.run.state_writer import StateWriter

logger = logging.getLogger(__name__)

UNRECORDED = "its retry cannot be recorded"


class Failures:
    """What fails for good in one worker.

    Args:
        node: The worker's name.
    """

    def __init__(self, lanes: Lanes[Delivery], settling: Settling, log: Log, states: StateWriter, *, node: str) -> None:
        self._lanes = lanes
        self._settling = settling
        self._log = log
        self._node = node
        self.states = states

    def note(self, request: Any, exc: BaseException) -> None:
        """Write to the journal that a task failed for good."""
        shard = request.delivery.shard
        shard.tally.count("failed")
        event = TaskFailed(shard.place.queue, self._node, request.id, request.name, error=type(exc).__name__)
        self._log.append(shard.place.names.journal, event.as_dict(), optional=True)

    def bury(self, request: Any, reason: str, error: str | None = None) -> None:
        """Make a dead letter of a message; whoever asks has its state stored."""
        self._store(request.delivery, reason, error, killed_pid=request.killed_pid)

    def bury_delivery(
        self, delivery: Delivery, *, reason: str, error: str | None = None, failure: BaseException | None = None
    ) -> None:
        """Make a dead letter of a message that never became a request, or of whose request nobody hears; store FAILURE.

        Args:
            failure: What its result will be; None: an error that says why.
        """
        if failure is None:
            failure = DeadLettered(f"{reason}: {error}" if error else reason)
        self._store(delivery, reason, error, failure=failure)

    def bury_unstarted(self, delivery: Delivery, exc: Exception) -> None:
        """Make a dead letter of what could not be started, whatever it was: its lane must go on."""
        logger.error("%r could not be started", delivery, exc_info=exc)
        self.bury_delivery(delivery, reason="could not be started", error=describe(exc))

    def bury_unrecorded(self, delivery: Delivery, refusal: Refusal) -> None:
        """Make a dead letter of a message that waits for a retry which can never be recorded."""
        if delivery.state is State.HELD:
            self.bury_delivery(delivery, reason=UNRECORDED, error=refusal.why)

    def give_up(self, request: Any, reason: str, error: str) -> None:
        """Make a dead letter of a message of which nobody else will say what became of it."""
        request.leave_by(self.bury, reason, error)
        self.note(request, WorkerLostError(reason))
        request.store_failure(f"{reason}: {error}")

    def _store(
        self,
        delivery: Delivery,
        reason: str,
        error: str | None,
        *,
        killed_pid: int | None = None,
        failure: BaseException | None = None,
    ) -> None:
        if self._settling.leave_orphan(delivery):
            return
        if not delivery.shard.holds(delivery):
            # It waited for its state when its shard was given up: its next owner ends it.
            self._settling.leave(delivery)
            return
        stored = partial(self._end, delivery, killed_pid, failure)
        DeadLetter(self._log, self._lanes, delivery, node=self._node, stored=stored).store(reason, error)

    def _end(self, delivery: Delivery, killed_pid: int | None, failure: BaseException | None) -> None:
        self._settling.settle(delivery, killed_pid=killed_pid)
        if failure is not None:
            tell_dead(self.states, delivery, failure)
