"""The life of a run: from the head of its lane to its acknowledgement.

`Runs` is called by the lanes to start an entry, and by the requests when a run ends; `submitting` hands it to the pool.
Per message:

    start ──▶ in the pool ──▶ finish     acknowledged, the lane goes on
      ▲            ├────────▶ retry      held until the retry is recorded and due, then start with retries + 1
      │            ├────────▶ wait       nothing has begun: held until what it waits for may have come, then start again
      │            ├────────▶ lose       the process died: held until the attempt is recorded, then start again;
      └────────────┴────────▶ bury       max_attempts reached, or rejected: stored as a dead letter, then finish

What must survive this worker is recorded first and done after: a redelivered message may have killed its last worker,
so its attempt is written before it starts, and a dead letter is confirmed before the message is acknowledged. A kill
between the two repeats a record or a dead letter and loses nothing.

All methods run where lanes may be moved: the main thread of an event-loop pool, or any thread of the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from celery.exceptions import WorkerLostError
from celery.worker.state import task_ready, task_reserved

from celery_sharding.dedup.waiting import WaitInLane
from celery_sharding.errors import DeadLettered
from celery_sharding.journal.events import RetryAsked, Settled, TaskFailed
from celery_sharding.rabbitmq.streams import encode
from celery_sharding.texts import describe
from celery_sharding.worker.celery_hooks.prefork import is_gone
from celery_sharding.worker.log import Log
from celery_sharding.worker.redelivery.announcer import Announcements
from celery_sharding.worker.redelivery.policy import Judge
from celery_sharding.worker.run.ack_batch import Acks
from celery_sharding.worker.run.dead_letter import store_dead_letter
from celery_sharding.worker.run.dead_states import tell_dead
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.run.lanes import Entry, Lanes, State
from celery_sharding.worker.run.pump import Turn
from celery_sharding.worker.run.retry import InPlaceRetry, encode_call
from celery_sharding.worker.run.state_writer import StateWriter
from celery_sharding.worker.run.submitting import Submitter
from celery_sharding.worker.run.waits import Waits
from celery_sharding.worker.shard.segment_gate import may_start

if TYPE_CHECKING:
    from celery_sharding.worker.shard.shard import Shard

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
_UNRECORDED = "its retry cannot be recorded"
_STATE_SECONDS = 10.0


class Runs:
    """Starts and ends the runs of one worker.

    Args:
        submit: Celery's way into the pool.
        call_after: Calls a function after some seconds, where lanes may be moved.
        call_soon: Calls a function when the event loop comes round; None if runs end elsewhere than in its thread.
        bucket_for: Returns the rate-limit bucket of a task name, or None.
        is_alive: Says whether the broker has shown life lately; nothing starts while it has not.
        slots: Says how many runs the pool takes at once.
        node: The worker's name.
        states: Tells what became of runs, where nothing waits for the result backend.
        read: Of a solo pool: reads what has come, and says whether that was anything; None for others.
        apart: Of a pool of greenlets: calls a function in another one. The one that has just ended its run has its slot
            until it is done, and would wait for it for ever if it started the next.
    """

    def __init__(
        self,
        *,
        submit: Callable[[Any], Any],
        call_after: Callable[[float, Callable[[], None]], Any],
        call_soon: Callable[[Callable[[], None]], Any] | None,
        bucket_for: Callable[[str], Any],
        is_alive: Callable[[], bool],
        slots: Callable[[], int],
        log: Log,
        node: str,
        states: StateWriter,
        read: Callable[[], bool] | None = None,
        apart: Callable[..., Any] | None = None,
    ) -> None:
        start = self._start if apart is None else partial(apart, self._start_apart)
        self.lanes = Lanes(
            start, slots, lambda: self.turn.end_soon(), lambda: self.turn.end(), may_start, self._bury_unstarted
        )
        self.turn = Turn(call_soon, self._pump, read)
        self._acks = None if call_soon is None or read is not None else Acks(call_after)
        self._starts_at_once = None if read is None else 1
        self.announcements = Announcements(log, self.lanes)
        self._submitter = Submitter(
            submit,
            self.lanes,
            self.announcements,
            call_after=call_after,
            bucket_for=bucket_for,
            is_alive=is_alive,
            give_up=self.give_up,
        )
        self.waits = Waits(self.lanes, call_after=call_after)
        self._judge = Judge(self, begin=self._submitter.begin, hold_for=self._submitter.hold_for)
        self.states = states
        self._on_idle: Callable[[Shard], None] | None = None
        self._call_after = call_after
        self._log = log
        self._node = node

    def begin(self, write: Callable[[], None] | None) -> None:
        """Begin with a new connection; see `Turn.begin`."""
        if self._acks is not None:
            self._acks.forget()
        self.turn.begin(write)

    def stop(self, on_idle: Callable[[Shard], None] | None = None) -> None:
        """From now on do everything at once: the event loop is about to end.

        Args:
            on_idle: Called with a shard when the last of its runs has ended, by the thread that ends them.
        """
        self._on_idle = on_idle
        self.turn.stop()
        acks, self._acks = self._acks, None
        if acks is not None:
            acks.tell_all()

    def admit(self, request: Any) -> None:
        """Put a request at the end of its lane."""
        delivery: Delivery = request.delivery
        # The entry must be known to the delivery before the lane can start it.
        delivery.entry = entry = Entry(delivery.lane, delivery.shard, request)
        if delivery.redelivered:
            self.announcements.expect(entry)
        self.lanes.admit_entry(entry)

    def finish(self, request: Any) -> None:
        """The message is done: acknowledge it and let its lane go on."""
        delivery: Delivery = request.delivery
        delivery.shard.count("done")
        delivery.note_end()
        self._settle(delivery, partial(self._leave, delivery))

    def finish_when_gone(self, request: Any) -> None:
        """Acknowledge now, and let the lane go on when the process that ran the request has ended."""
        request.delivery.shard.count("killed")
        request.delivery.note_end()
        gone = partial(self._when_gone, request.killed_pid, partial(self._leave, request.delivery))
        self._settle(request.delivery, gone)

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
            self.bury(request, _UNRECORDED, error)
            request.store_failure(f"{_UNRECORDED}: {error}")
            return
        if not self._hold(delivery, again):
            return
        self._forget_waits(delivery)
        delivery.attempts = 0  # the run has come to an end
        due_at = time.monotonic() + wait_seconds
        delivery.shard.count("retried")
        delivery.note_end()
        delivery.is_recorded = True
        self._log.append(
            delivery.shard.names.attempts,
            event,
            lambda: self._call_after(max(0.0, due_at - time.monotonic()), partial(self._due, delivery)),
            refused=lambda refusal: self._bury_held(delivery, reason=_UNRECORDED, error=refusal.why),
        )
        self._note_end(delivery.shard)  # Last: its shard may be given up at once, with what was written.

    def wait(self, request: Any, wait: WaitInLane) -> None:
        """Try the message again in its place, when what it waits for may have come.

        While only its commit is left, its shard is busy: its next owner would run it again.
        """
        delivery: Delivery = request.delivery
        again = request.rebuild(retries=request.request_dict.get("retries", 0), wait=wait)
        entry = delivery.entry
        self.waits.learn(wait)
        if entry is None or not self._hold(delivery, again, is_resting=wait.commit is None):
            return
        self.announcements.take_back(delivery)
        self.waits.wait(entry, wait)
        self._note_end(delivery.shard)

    def lose(self, request: Any, error: str) -> None:
        """The run's process died: run the message again or, if its attempts are used up, make it a dead letter."""
        delivery: Delivery = request.delivery
        delivery.attempts = delivery.attempts or 1
        delivery.shard.count("lost")
        if delivery.attempts >= delivery.shard.group.max_attempts:
            self.give_up(request, f"lost {delivery.attempts} times", error)
            return
        again = request.rebuild(retries=request.request_dict.get("retries", 0))
        logger.warning("%s: the process of %s[%s] was lost (%s)", delivery.label, request.name, request.id, error)
        if self._hold(delivery, again):
            self._forget_waits(delivery)
            due = partial(self._when_gone, request.killed_pid, partial(self._due, delivery))
            self.announcements.record(delivery, delivery.attempts, due)
            self._note_end(delivery.shard)

    def await_state(self, request: Any, end: Callable[[bool], None]) -> None:
        """Hold a message that will not run, and give its slot back, until its state is stored; not for ever.

        Args:
            end: Ends it, given whether the state was stored; called after a while if nobody has.
        """
        entry = request.delivery.entry
        if entry is not None:
            self.lanes.hold(entry)
        self._call_after(_STATE_SECONDS, partial(end, False))

    def abandon(self, request: Any) -> None:
        """The run was cut off because its shard is about to be given up: keep its place until then, and start nothing.

        The message is not acknowledged, so its next owner runs it.
        """
        entry = request.delivery.entry
        if entry is not None:
            self.lanes.hold(entry)

    def give_up(self, request: Any, reason: str, error: str) -> None:
        """Make a dead letter of a message of which nobody else will say what became of it."""
        request.leave_by(self.bury, reason, error)
        self.note_failure(request, WorkerLostError(reason))
        request.store_failure(f"{reason}: {error}")

    def bury(self, request: Any, reason: str, error: str | None = None) -> None:
        """Store the message as a dead letter, then finish it; whoever asks has its state stored."""
        delivery, pid = request.delivery, request.killed_pid

        def stored() -> None:
            self._settle(delivery, partial(self._when_gone, pid, partial(self._leave, delivery)))

        self._bury(delivery, reason, error, stored)

    def bury_delivery(
        self, delivery: Delivery, *, reason: str, error: str | None = None, failure: BaseException | None = None
    ) -> None:
        """Store a message as a dead letter that never became a request, acknowledge it, and store its state.

        Args:
            failure: What its result will be; None: an error that says why.
        """
        if failure is None:
            failure = DeadLettered(f"{reason}: {error}" if error else reason)

        def stored() -> None:
            self._settle(delivery, partial(self._leave, delivery))
            tell_dead(self.states, delivery, failure)

        self._bury(delivery, reason, error, stored)

    def _bury(self, delivery: Delivery, reason: str, error: str | None, stored: Callable[[], None]) -> None:
        if self.leave_orphan(delivery):
            return
        if not delivery.is_here:
            self._leave(delivery)  # it waited for its state when its shard was given up: its next owner ends it
            return

        def held() -> None:
            delivery.shard.count("unburied")
            if delivery.entry is not None:
                self.lanes.hold(delivery.entry)

        store_dead_letter(self._log, delivery, node=self._node, reason=reason, error=error, stored=stored, held=held)

    def _bury_held(self, delivery: Delivery, *, reason: str, error: str) -> None:
        if delivery.entry is not None and delivery.entry.state is State.HELD:
            self.bury_delivery(delivery, reason=reason, error=error)

    def leave_orphan(self, delivery: Delivery) -> bool:
        """If the run's message is the broker's again, only unlock its lane; say whether that was so."""
        if delivery.entry is None or delivery.entry.state is not State.ORPHAN:
            return False
        self._leave(delivery)
        return True

    def leave(self, request: Any) -> None:
        """The run of a message that is acknowledged already has ended: let its lane go on."""
        self._leave(request.delivery)

    def note_failure(self, request: Any, exc: BaseException) -> None:
        """Write to the journal that a task failed for good."""
        shard = request.delivery.shard
        shard.count("failed")
        event = TaskFailed(shard.queue, self._node, request.id, request.name, error=type(exc).__name__)
        self._log.append(shard.names.journal, event.as_dict(), optional=True)

    def forget(self, shard: Shard) -> None:
        """Forget what a shard was delivered and does not run: it is the broker's again, and no request of Celery's."""
        self.announcements.forget(shard)
        for entry in self.lanes.close(shard):
            self.waits.forget(entry)
            task_ready(entry.item)

    def unaccepted(self) -> list[Entry]:
        """Return the runs handed to the pool that no process of it has begun, as far as is known."""
        return [entry for entry in self.lanes.in_pool() if entry.item.time_start is None and not entry.item.is_cut_off]

    def running(self) -> list[Any]:
        """Return the requests that a process of the pool runs, or may begin any moment."""
        requests = [entry.item for entry in self.lanes.in_pool()]
        return [request for request in requests if not request.has_left or request.killed_pid is not None]

    def release_orphans(self, kill: Callable[[int], None], *, is_flushed: bool) -> None:
        """Of a prefork pool: end what runs without a message, so that its redelivery does not overlap it.

        A run that has begun is killed; its lane stays locked until it has ended, as it does in the other pools.

        Args:
            is_flushed: The pool has forgotten what no process had accepted, as Celery makes it when the connection is
                lost. Else such a run is still to begin, and comes to its own end.
        """
        for entry in self.lanes.in_pool():
            request = entry.item
            if entry.state is not State.ORPHAN:
                continue
            if request.has_left and request.killed_pid is None:
                continue  # it has ended, and waits for what is written of it; its process runs something else
            if request.time_start is not None:
                logger.warning("killing the run of %s[%s]: its shard's channel was lost", request.name, request.id)
                kill(request.worker_pid)
            elif is_flushed:
                self.lanes.settle(entry)

    def _pump(self) -> None:
        self._judge.release()
        self.lanes.pump(self._starts_at_once)
        self.announcements.announce_next()
        if self._acks is not None and not self.lanes.is_full():
            self._acks.tell_all()

    def _start(self, entry: Entry) -> None:
        if self._acks is not None:
            self._acks.tell(entry.lane)
        request = entry.item
        delivery: Delivery = request.delivery
        if not self.waits.lets_begin(entry):
            return
        if delivery.is_judged or not (delivery.redelivered or delivery.was_taken_back):
            self._submitter.begin(entry)
        else:
            self._judge.judge(entry)

    def _start_apart(self, entry: Entry) -> None:
        """Start an entry in a greenlet of its own, of whose errors the lanes do not hear."""
        try:
            self._start(entry)
        except Exception as exc:
            self.fail_start(entry, exc)

    def fail_start(self, entry: Entry, exc: Exception) -> None:
        """Bury what could not be started, where the lanes do not hear of it."""
        if self.lanes.hold(entry):
            self._bury_unstarted(entry, exc)

    def _bury_unstarted(self, entry: Entry, exc: Exception) -> None:
        """Bury what could not be started, whatever it was: its lane must go on, and it must not be lost."""
        logger.error("%r could not be started", entry, exc_info=exc)
        self.bury_delivery(entry.item.delivery, reason="could not be started", error=describe(exc))

    def _hold(self, delivery: Delivery, again: Any, *, is_resting: bool = False) -> bool:
        entry = delivery.entry
        if entry is None or not self.lanes.hold(entry, is_resting=is_resting):
            return False
        entry.item = again
        task_reserved(again)
        return True

    def _forget_waits(self, delivery: Delivery) -> None:
        if delivery.entry is not None:
            self.waits.forget(delivery.entry)

    def _due(self, delivery: Delivery) -> None:
        if delivery.entry is not None:
            self.lanes.due(delivery.entry)

    def _settle(self, delivery: Delivery, then: Callable[[], None]) -> None:
        """Acknowledge a message, then call `then`."""
        if delivery.is_recorded and not delivery.is_named:
            # The next may be the same to the byte. What is recorded must be gone before that can be taken for this one.
            def forgotten() -> None:
                delivery.acknowledge(gather=False)
                then()

            self._log.append(delivery.shard.names.attempts, Settled(delivery.message_id).as_dict(), forgotten)
            return
        acks, entry = self._acks, delivery.entry
        if acks is None or entry is None or delivery.is_recorded:
            delivery.acknowledge(gather=False)
        else:
            delivery.acknowledge(gather=True)
            acks.gather(entry.lane, delivery.shard)
        if delivery.is_recorded:
            self._log.append(delivery.shard.names.attempts, Settled(delivery.message_id).as_dict(), optional=True)
        then()

    def _leave(self, delivery: Delivery) -> None:
        entry, delivery.entry = delivery.entry, None
        if entry is not None:
            self.waits.forget(entry)
            self.lanes.settle(entry)
            self._note_end(delivery.shard)

    def _note_end(self, shard: Shard) -> None:
        if self._on_idle is not None and not self.lanes.running(shard):
            self._on_idle(shard)

    def _when_gone(self, pid: int | None, then: Callable[[], None]) -> None:
        if pid is None or is_gone(pid):
            then()
        else:
            self._call_after(_POLL_SECONDS, partial(self._when_gone, pid, then))
