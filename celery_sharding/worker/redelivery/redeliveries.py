"""From a redelivered message whose turn it is to its run: what `policy` decides is done here.

    starts ──attempts of its shard known──▶ decided ─┬─ Begin ──▶ its attempt is recorded ──▶ begins
                                                     ├─ Wait ──▶ held, and decided again
                                                     └─ DeadLetter ──▶ buried

It keeps its slot in the pool until its attempt is recorded: only what is about to begin counts as begun.

Called where lanes may be moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from celery_sharding.celery_hooks.retry import decode_call
from celery_sharding.worker.log import Log
from celery_sharding.worker.redelivery.announcer import Announcer
from celery_sharding.worker.redelivery.policy import DeadLetter, Wait, history_of, known_attempts
from celery_sharding.worker.redelivery.suspects import Suspects
from celery_sharding.worker.run.delivery import Delivery, State
from celery_sharding.worker.run.failures import Failures
from celery_sharding.worker.run.lanes import Lanes
from celery_sharding.worker.run.settling import Settling
from celery_sharding.worker.run.waits import Waits


class Runner(Protocol):
    """Hands runs to the pool."""

    def begin_run(self, delivery: Delivery) -> None: ...


class Redeliveries:
    """The redelivered messages of one worker.

    Attributes:
        are_any: There were some, or messages that are judged like them.
    """

    def __init__(self, lanes: Lanes[Delivery], waits: Waits, settling: Settling, failures: Failures, log: Log) -> None:
        self._lanes = lanes
        self._waits = waits
        self._settling = settling
        self._failures = failures
        self._suspects = Suspects()
        self.announcer = Announcer(log, lanes)
        self.are_any = False

    def expect(self, delivery: Delivery) -> None:
        """Take note of a message whose run is to be announced, before it is admitted."""
        self.are_any = True
        self.announcer.expect(delivery)

    def consider(self, delivery: Delivery, runner: Runner) -> None:
        """Let `runner` begin when all that speaks for a message is known and recorded; bury it, or let it wait."""
        self.are_any = True
        if delivery.shard.catch_up():
            self._consider(delivery, runner)
        else:
            consider = partial(self._consider, runner=runner)
            delivery.shard.attempts.when_complete(partial(self.call_guarded, consider, delivery))

    def release(self) -> None:
        """Let the suspects go on that waited for others, which have ended."""
        for delivery in self._suspects.take_ready():
            self._lanes.due(delivery)

    def call_guarded(self, call: Callable[[Delivery], None], delivery: Delivery) -> None:
        """Start a message where the lanes do not hear of an error: its key and its slot would be lost."""
        try:
            call(delivery)
        except Exception as exc:
            if self._lanes.hold(delivery):
                self._failures.bury_unstarted(delivery, exc)

    def _consider(self, delivery: Delivery, runner: Runner) -> None:
        if delivery.state is not State.RUNNING:
            self._settling.leave_orphan(delivery)
            return
        known = known_attempts(delivery)
        history = history_of(delivery, known, now=time.time())
        decision = self._suspects.decide(delivery, history)
        if isinstance(decision, Wait):
            if decision.seconds is not None:
                self._waits.hold_for(delivery, decision.seconds)
            elif self._lanes.hold(delivery):
                self._suspects.wait(delivery, history)
                self.release()
            return
        delivery.ensure_record().judge(begun=decision.begun, is_known=known is not None)
        request = delivery.request
        if known is not None and known.retries > request.request_dict.get("retries", 0):
            delivery.request = request = request.rebuild(
                retries=known.retries,
                body=None if known.body is None else decode_call(request, known),
                time_limits=known.time_limits,
            )
        if isinstance(decision, DeadLetter):
            self._failures.bury(request, decision.reason)
            request.store_failure(decision.reason)
        else:
            self.announcer.record(delivery, decision.begun, partial(self._begin, delivery, runner))

    def _begin(self, delivery: Delivery, runner: Runner) -> None:
        """Begin what is recorded now."""
        if delivery.state is not State.RUNNING:
            self._settling.leave_orphan(delivery)
        elif self._lanes.is_frozen(delivery.shard):
            self._lanes.again(delivery)
        else:
            self.call_guarded(runner.begin_run, delivery)
