"""The life of a run: from the head of its lane to its acknowledgement.

The lanes call `Executor` to start a message, and its request reports how the run ended:

    start ──▶ in the pool ──▶ finish     acknowledged, the lane goes on
      ▲            ├────────▶ retry      held until the retry is recorded and due, then start with retries + 1
      │            ├────────▶ wait       nothing has begun: held until what it waits for may have come, then start again
      │            ├────────▶ lose       the process died: held until the attempt is recorded, then start again;
      └────────────┴────────▶ failures   max_attempts reached, or rejected: stored as a dead letter, then finish

A run begins unless something speaks against it for the moment. It is held in its place, without a slot, for so long:

    the broker has shown no life lately    0.5 s
    its task's rate limit is used up       until it lets one through
    Celery could not hand it over          1 s, and the fifth time it is a dead letter

What must survive this worker is recorded first and done after: a redelivered message may have killed its last worker,
so its attempt is written before it starts (`redelivery`), and a dead letter is confirmed before its message is
acknowledged. A kill between the two repeats a record or a dead letter and loses nothing.

All methods run where lanes may be moved: the main thread of an event-loop pool, or any thread of the others.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery_sharding.celery_hooks.retry import InPlaceRetry, encode_call
from celery_sharding.dedup.waiting import WaitInLane
from celery_sharding.journal.events import RetryAsked
from celery_sharding.rabbitmq.streams import encode
from celery_sharding.texts import describe
from celery_sharding.worker.log import Log, event_write
from celery_sharding.worker.ports import Children, Clock, Loop, Pool, Source
from celery_sharding.worker.redelivery.redeliveries import Redeliveries
from celery_sharding.worker.run.ack_batch import Acks
from celery_sharding.worker.run.delivery import Delivery, State
from celery_sharding.worker.run.failures import UNRECORDED, Failures
from celery_sharding.worker.run.lanes import Lanes
from celery_sharding.worker.run.limits import Limits
from celery_sharding.worker.run.pump import Turn, Writer
from celery_sharding.worker.run.settling import Settling, ShardCloser
from celery_sharding.worker.run.state_writer import StateWriter
from celery_sharding.worker.run.waits import Waits

logger = logging.getLogger(__name__)

_STATE_SECONDS = 10.0
_LIFE_SECONDS = 0.5
_PAUSE_SECONDS = 1.0
_STARTS_MAX = 5


class Executor:
    """Starts and ends the runs of one worker.

    Args:
        loop: None if runs may end in any thread.
        node: The worker's name.
        states: Tells what became of runs, where nothing waits for the result backend.
    """

    def __init__(
        self, pool: Pool, clock: Clock, log: Log, states: StateWriter, *, node: str, loop: Loop | None = None
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._log = log
        self._turn = Turn(loop, self._pump)
        self.lanes: Lanes[Delivery] = Lanes(pool, self._turn, _GreenStarter(self, pool) if pool.is_green else self)
        self._limits = Limits(self.lanes, pool, clock)
        self.waits = Waits(self.lanes, clock)
        acks = Acks(clock) if loop is not None and not loop.reads_first else None
        self.settling = Settling(self.lanes, self.waits, log, clock, acks)
        self.failures = Failures(self.lanes, self.settling, log, states, node=node)
        self.redeliveries = Redeliveries(self.lanes, self.waits, self.settling, self.failures, log)

    def begin(self, writer: Writer | None) -> None:
        """Begin with a new connection; see `Turn.begin`."""
        self.settling.begin()
        self._turn.begin(writer)

    def stop(self, closer: ShardCloser | None = None) -> None:
        """From now on do everything at once: the event loop is about to end, and the pool takes nothing more.

        Args:
            closer: Gives up each shard when the last of its runs has ended, in the thread that ends them.
        """
        self._turn.stop()
        self.settling.stop(closer)

    def admit(self, request: Any) -> None:
        """Put a request at the end of its lane."""
        delivery: Delivery = request.delivery
        delivery.request = request
        if delivery.record is not None:
            self.redeliveries.expect(delivery)
        self.lanes.admit(delivery)

    def start(self, delivery: Delivery) -> None:
        """Start a message that is at the head of its lane, unless something speaks against it for the moment."""
        acks = self.settling.acks
        if acks is not None:
            acks.tell(delivery.lane)
        if self.waits.outage is not None and not self.waits.pass_or_hold(delivery):
            return
        if delivery.record is None or delivery.record.is_judged:
            self.begin_run(delivery)
        else:
            self.redeliveries.consider(delivery, self)

    def begin_run(self, delivery: Delivery) -> None:
        """Hand a run to the pool, or hold it for a while."""
        if not self._pool.hears_broker():
            self.waits.hold_for(delivery, _LIFE_SECONDS)
            return
        if not self._limits.pass_or_hold(delivery):
            return
        request = delivery.request
        if delivery.record is not None:
            self.redeliveries.announcer.begun(delivery)  # before, since a solo pool runs the task in it
        delivery.note_start()
        try:
            self._pool.submit(request)
        except Exception as exc:
            self._begin_later(delivery, request, exc)

    def fail_start(self, delivery: Delivery, error: Exception) -> None:
        """Bury what could not be started."""
        self.failures.bury_unstarted(delivery, error)

    def finish(self, request: Any) -> None:
        """The message is done: acknowledge it and let its lane go on."""
        delivery: Delivery = request.delivery
        delivery.shard.tally.count("done")
        delivery.note_end()
        self.settling.settle(delivery)

    def finish_when_gone(self, request: Any) -> None:
        """Acknowledge now, and let the lane go on when the process that ran the request has ended."""
        request.delivery.shard.tally.count("killed")
        request.delivery.note_end()
        self.settling.settle(request.delivery, killed_pid=request.killed_pid)

    def leave(self, request: Any) -> None:
        """The run of a message that is acknowledged already has ended: let its lane go on."""
        self.settling.leave(request.delivery)

    def retry(self, request: Any, retry: InPlaceRetry) -> None:
        """Run the message again in its place, when the retry is due."""
        delivery: Delivery = request.delivery
        retries = (request.request_dict.get("retries") or 0) + 1
        try:
            wait_seconds = retry.seconds()
            again = request.rebuild(retries=retries, body=retry.body, time_limits=retry.time_limits)
            changed = {} if retry.body is None else encode_call(again, retry.body)
            event = RetryAsked(
                delivery.message_id, retries, 0, wait_seconds=wait_seconds, time_limits=retry.time_limits, **changed
            ).as_dict()
            encode(event)
        except Exception as exc:
            # Anything that the task gave to its retry.
            error = describe(exc)
            self.failures.bury(request, UNRECORDED, error)
            request.store_failure(f"{UNRECORDED}: {error}")
            return
        if not self._hold(delivery, again):
            return
        self.waits.forget(delivery)
        delivery.ensure_record().retry()
        due_at = time.monotonic() + wait_seconds
        delivery.shard.tally.count("retried")
        delivery.note_end()
        write = dataclasses.replace(
            event_write(delivery.place.names.attempts, event),
            then=partial(self._await_retry, delivery, due_at),
            refused=partial(self.failures.bury_unrecorded, delivery),
        )
        self._log.write([write])
        self.settling.note_end(delivery.shard)  # Last: its shard may be given up at once, with what was written.

    def wait(self, request: Any, wait: WaitInLane) -> None:
        """Try the message again in its place, when what it waits for may have come.

        While only its commit is left, its shard is busy: its next owner would run it again.
        """
        delivery: Delivery = request.delivery
        again = request.rebuild(retries=request.request_dict.get("retries", 0), wait=wait)
        self.waits.learn(wait)
        if not self._hold(delivery, again, is_resting=wait.commit is None):
            return
        self.redeliveries.announcer.take_back(delivery)
        self.waits.wait(delivery, wait)
        self.settling.note_end(delivery.shard)

    def lose(self, request: Any, error: str) -> None:
        """The run's process died: run the message again or, if its attempts are used up, make it a dead letter."""
        delivery: Delivery = request.delivery
        delivery.ensure_record().lose()
        delivery.shard.tally.count("lost")
        if delivery.attempts >= delivery.place.group.max_attempts:
            self.failures.give_up(request, f"lost {delivery.attempts} times", error)
            return
        again = request.rebuild(retries=request.request_dict.get("retries", 0))
        logger.warning("%s: the process of %s[%s] was lost (%s)", delivery.place.label, request.name, request.id, error)
        if self._hold(delivery, again):
            self.waits.forget(delivery)
            due = partial(self.settling.call_when_gone, request.killed_pid, partial(self.lanes.due, delivery))
            self.redeliveries.announcer.record(delivery, delivery.attempts, due)
            self.settling.note_end(delivery.shard)

    def await_state(self, request: Any, end: Callable[[bool], None]) -> None:
        """Hold a message that will not run, and give its slot back, until its state is stored; not for ever.

        Args:
            end: Ends it, given whether the state was stored; called after a while if nobody has.
        """
        self.lanes.hold(request.delivery)
        self._clock.call_after(_STATE_SECONDS, partial(end, False))

    def abandon(self, request: Any) -> None:
        """The run was cut off because its shard is about to be given up: keep its place until then, and start nothing.

        The message is not acknowledged, so its next owner runs it.
        """
        self.lanes.hold(request.delivery)

    def forget(self, shard: Source) -> None:
        """Forget what a shard was delivered and does not run: it is the broker's again, and no request of Celery's."""
        self.redeliveries.announcer.forget(shard)
        for delivery in self.lanes.close(shard):
            self.waits.forget(delivery)
            delivery.request.mark_ready()

    def unaccepted(self) -> list[Delivery]:
        """Return the runs handed to the pool that no process of it has begun, as far as is known."""
        return [run for run in self.lanes.in_pool() if run.request.time_start is None and not run.request.is_cut_off]

    def running(self) -> list[Any]:
        """Return the requests that a process of the pool runs, or may begin any moment; for any thread."""
        requests = [run.request for run in self.lanes.in_pool()]  # None: it has just ended, in another thread
        return [each for each in requests if each is not None and (not each.has_left or each.killed_pid is not None)]

    def kill_orphans(self, children: Children, *, is_flushed: bool) -> None:
        """Of a prefork pool: end what runs without a message, so that its redelivery does not overlap it.

        A run that has begun is killed; its lane stays locked until it has ended, as it does in the other pools.

        Args:
            is_flushed: The pool has forgotten what no process had accepted, as Celery makes it when the connection is
                lost. Else such a run is still to begin, and comes to its own end.
        """
        for run in self.lanes.in_pool():
            request = run.request
            if run.state is not State.ORPHAN:
                continue
            if request.has_left and request.killed_pid is None:
                continue  # it has ended, and waits for what is written of it; its process runs something else
            if request.time_start is not None:
                logger.warning("killing the run of %s[%s]: its shard's channel was lost", request.name, request.id)
                children.kill(request.worker_pid)
            elif is_flushed:
                self.lanes.settle(run)

    def _pump(self) -> None:
        if self.redeliveries.are_any:
            self.redeliveries.release()
        self.lanes.pump(self._turn.starts_at_once)
        if self.redeliveries.are_any:
            self.redeliveries.announcer.announce_next()
        acks = self.settling.acks
        if acks is not None and not self.lanes.is_full():
            acks.tell_all()

    def _begin_later(self, delivery: Delivery, request: Any, error: Exception) -> None:
        """Start a run later that could not be handed over, not for ever: what its message says may be the reason."""
        if request.has_left:
            logger.error("%s[%s]: an error after it was settled", request.name, request.id, exc_info=error)
            return
        request.failed_starts += 1
        if request.failed_starts >= _STARTS_MAX:
            self.failures.give_up(request, "could not be started", describe(error))
            return
        logger.error("%s[%s] could not be started, trying again", request.name, request.id, exc_info=error)
        if delivery.record is not None:
            delivery.record.put_back()
        self.waits.hold_for(delivery, _PAUSE_SECONDS)

    def _hold(self, delivery: Delivery, again: Any, *, is_resting: bool = False) -> bool:
        if not self.lanes.hold(delivery, is_resting=is_resting):
            return False
        delivery.request = again
        again.mark_reserved()
        return True

    def _await_retry(self, delivery: Delivery, due_at: float) -> None:
        self._clock.call_after(max(0.0, due_at - time.monotonic()), partial(self.lanes.due, delivery))


class _GreenStarter:
    """Starts messages in greenlets of their own, of whose errors the lanes do not hear."""

    def __init__(self, executor: Executor, pool: Pool) -> None:
        self._executor = executor
        self._pool = pool

    def start(self, delivery: Delivery) -> None:
        self._pool.spawn(self._executor.redeliveries.call_guarded, self._executor.start, delivery)

    def fail_start(self, delivery: Delivery, error: Exception) -> None:
        self._executor.fail_start(delivery, error)
