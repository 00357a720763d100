"""The bootstep that makes a Celery worker consume its groups.

It says when; what is consumed then is in `groups`. It stands behind those of Celery's own steps that consume, so that
it stops before them. It lives as long as the consumer; `start`, `stop` come again with every connection, `shutdown`
once.

    start                      every (re)connect: look at each group on the broker, recover it if its ring is lost
    register_with_event_loop   consume; before it, a prefork pool cannot take work. Pools without a loop do it in start
    stop                       the connection is gone: forget what it delivered.  The worker stops: freeze the lanes,
                               and close the channels of shards of which nothing runs
    shutdown                   after the pool has drained: close the other channels, which returns the rest in order

Celery's warm shutdown cancels its consumer, lets the pool drain and calls `shutdown` last. Freezing in `stop`, and
closing what nothing runs of, keeps the order through it; a timer that fires in between finds its lane frozen. In a
prefork pool a shard is closed as soon as the last of its runs has ended, since a pool takes a second or more to end. A
cold shutdown first cancels, in a signal handler, what runs: from then on nothing may start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker.consumer.control import Control
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.tasks import Tasks

from celery_sharding.dedup.notices import STORE_ANSWERS, Notice, Notices
from celery_sharding.errors import ShardingError
from celery_sharding.rabbitmq.connect import ANSWER_SECONDS_MIN, FAREWELL_SECONDS, bound_waits
from celery_sharding.wire import RUN_ATTRIBUTES
from celery_sharding.worker.calls import Calls
from celery_sharding.worker.celery_hooks.child_guard import ChildGuard
from celery_sharding.worker.celery_hooks.exits import guard_exits
from celery_sharding.worker.celery_hooks.green import read_more, read_what_came
from celery_sharding.worker.celery_hooks.naming import describe_process, wait_for_name
from celery_sharding.worker.celery_hooks.prefork import PreforkPool, direct_writer, release_on_error
from celery_sharding.worker.celery_hooks.pulse import Pulse, call_with_pulse, keep_pulse
from celery_sharding.worker.celery_hooks.reconnect import limit_waits, reconnect_sooner, take_turns
from celery_sharding.worker.celery_hooks.remote import install_commands, note_addressees
from celery_sharding.worker.celery_hooks.request import DELIVERY, install
from celery_sharding.worker.celery_hooks.revoking import install_revoke
from celery_sharding.worker.celery_hooks.strays import Strays
from celery_sharding.worker.celery_hooks.watchdog import BEATS, Watchdog
from celery_sharding.worker.consume.groups import Groups
from celery_sharding.worker.consume.receiver import Intake
from celery_sharding.worker.executor import Runs
from celery_sharding.worker.run.state_writer import StateWriter

if TYPE_CHECKING:
    from celery_sharding.brokers.base import Backing
    from celery_sharding.worker.shard.shard import Shard

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
TICK_SECONDS = 1.0
_STATES_SECONDS = 5.0
PREFORK, SOLO = "celery.concurrency.prefork", "celery.concurrency.solo"


class ShardsStep(bootsteps.StartStopStep):
    """Consumes the groups of `app.sharding` beside the worker's usual queues."""

    label = "Shards"
    # Those behind it stop before it, and `Control` and `Gossip` wait for the broker then: long, if it does not answer,
    # and for ever, if a signal to end cold comes in the middle, whose handler reads the same socket. No shard may
    # wait for that.
    requires = (Tasks, Control, Gossip)

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        sharding = c.app.sharding
        self._consumer = c
        self._backing: Backing = sharding.backing()
        sharded = install(c.app, sharding.rules)
        sharding.tell_doubts(c.app.amqp.queues.doubts, worker=True)
        pool = type(c.pool).__module__
        has_children = pool == PREFORK
        sharding.check_stores(has_child_processes=has_children)
        has_turns = bool(c.hub) and pool == SOLO
        self._notices = Notices(self._note)  # before the pool forks
        self._calls = calls = Calls(c)
        # The main thread of a solo pool runs the tasks: another thread could not wake it.
        pulse = Pulse(self._connections) if pool == SOLO else None
        self._log = self._backing.open_log(calls, inline=pulse)
        self._states = StateWriter(lambda: c.app.backend, post=calls.post, is_green=getattr(c.pool, "is_green", False))
        guard_exits(c.pool, has_children=has_children)
        self._runs = Runs(
            submit=release_on_error(c.controller, c.on_task_request),
            call_after=calls.call_after,
            call_soon=c.hub.call_soon if c.hub and has_children else calls.call_next if has_turns else None,
            read=self._read if has_turns else None,
            apart=c.pool.spawn_n if getattr(c.pool, "is_green", False) else None,
            bucket_for=lambda task_name: self._intake.bucket_for(task_name),
            is_alive=self._is_alive,
            slots=self._slots,
            log=self._log,
            node=c.hostname,
            states=self._states,
        )
        intake = self._intake = Intake(c, self._runs, sharded)
        self._strays = Strays(sharded)
        self._stopping = False
        self._groups = Groups(
            c,
            self._backing,
            sharding.selection(),
            runs=self._runs,
            log=self._log,
            receive=intake.receive,
            calls=calls,
            release_orphans=lambda: self._release_orphans(is_flushed=False),
            is_stopping=lambda: self._stopping,
        )
        self._prefork = (
            PreforkPool(c, freeze=self._groups.freeze, has_unaccepted=lambda: bool(self._runs.unaccepted()))
            if c.hub and has_children
            else None
        )
        self._watchdog = (
            Watchdog(lambda: c.connection, self._cut_off, ChildGuard()) if self._prefork is not None else None
        )
        c.on_task_request = self._wrap(c.on_task_request)
        c.cancel_active_requests = self._before_cancel(c.cancel_active_requests)
        c.shards = self._groups  # where commands of remote control find them
        c.shards_states = self._states
        install_commands()
        install_revoke()
        self._timers: list[Any] = []
        reconnect_sooner(c)
        limit_waits(c, max(sharding.settings.heartbeat_seconds, ANSWER_SECONDS_MIN))
        self._leave_node = take_turns(c)
        # A channel that the broker closes (consumer time-out) would end the worker; this lets it connect anew instead.
        c.app.conf.broker_channel_error_retry = True
        if c.hub or getattr(c.pool, "is_green", False):
            heartbeat_seconds = sharding.settings.heartbeat_seconds
            c.amqheartbeat_rate = max(c.amqheartbeat_rate, BEATS)
            c.amqheartbeat = min(c.amqheartbeat or heartbeat_seconds, heartbeat_seconds)
        if pulse is not None:
            keep_pulse(c.pool, pulse)
        if getattr(c.pool, "is_green", False) and self._backing.has_logs:
            read_more(c)

    def create(self, c: Any) -> None:
        """Take hold of the steps that this one requires; they are there by now."""
        note_addressees(c)
        wait_for_name(c)

    def start(self, c: Any) -> None:
        """Look at the broker, and consume if the pool has no event loop."""
        c.app.sharding.consumer_thread = threading.get_ident()
        if self._prefork is not None:
            self._prefork.prepare()
        try:
            call_with_pulse(c.connection, self._groups.prepare)
            self._groups.check_channels()
        except ShardingError as exc:
            # What does not pass by itself. Celery would show where it was raised, and its message at the end of that.
            logger.critical("this worker cannot consume its shards, and stops: %s", exc)
            raise WorkerShutdown(EX_FAILURE) from exc
        if not c.hub:
            self._consume(c)

    def register_with_event_loop(self, c: Any, hub: Any) -> None:
        """Consume, now that the pool can take work."""
        self._calls.attach(hub)
        hub.add_reader(self._notices.reader, self._notices.read)
        self._runs.begin(direct_writer(c.pool, hub) if self._prefork is not None else None)
        if self._watchdog is not None:
            self._watchdog.start()
        self._consume(c)

    def stop(self, c: Any) -> None:
        """Forget a lost connection, or freeze before the pool drains."""
        self._stopping = c.blueprint.state != bootsteps.RUN
        if self._stopping:
            # The ends of a prefork pool's runs come in this thread, while the pool drains.
            self._runs.stop(self._give_up if self._prefork is not None else None)
            self._groups.freeze()
            self._give_up_idle()
            return
        self._leave_node()
        self._cancel_timers()
        events = getattr(c.event_dispatcher, "connection", None)
        if events is not None:
            # Celery closes it at the next connect, and waits for the broker's farewell.
            bound_waits(events, FAREWELL_SECONDS)
        self._groups.drop()
        self._release_orphans(is_flushed=True)

    terminate = stop

    def shutdown(self, c: Any) -> None:
        """Close the channels that are left; every run that could end has ended."""
        self._cancel_timers()
        self._calls.stop()
        self._notices.read()
        self._record_all(5.0)
        self._groups.close()
        self._log.stop()
        self._states.stop(_STATES_SECONDS)
        c.app.sharding.consumer_thread = None

    def info(self, c: Any) -> dict[str, Any]:
        """Return what `celery inspect stats` shows."""
        return {"shards": self._groups.indexes(), **describe_process()}

    def _consume(self, c: Any) -> None:
        self._groups.open()
        self._timers = [c.timer.call_repeatedly(TICK_SECONDS, self._notices.read)]
        if self._backing.has_logs:
            self._timers += [
                c.timer.call_repeatedly(TICK_SECONDS, self._groups.tick),
                c.timer.call_repeatedly(LOOK_SECONDS, self._groups.look),
            ]

    def _release_orphans(self, *, is_flushed: bool) -> None:
        if self._prefork is not None:
            self._runs.release_orphans(self._prefork.kill, is_flushed=is_flushed)

    def _cut_off(self) -> Iterable[int] | None:
        return None if self._prefork is None else self._prefork.cut_off(self._runs.running())

    def _give_up_idle(self) -> None:
        """Close the shards of which nothing runs, frozen before: nobody has to wait for the rest of the pool."""
        self._record_all(2.0)
        self._groups.give_up_idle()

    def _give_up(self, shard: Shard) -> None:
        """Close a frozen shard whose last run has ended."""
        self._record_all(2.0)
        self._groups.give_up(shard)

    def _record_all(self, timeout_seconds: float) -> None:
        """Let the next owners know what they must, before channels are closed."""
        self._log.flush(timeout_seconds)
        self._calls.deliver()
        self._groups.withdraw()
        self._log.flush(timeout_seconds)

    def _note(self, notice: Notice) -> None:
        """Say by an event what a run under a claim told, and count it if its shard is here."""
        if notice.what == STORE_ANSWERS:
            self._runs.waits.answers()
            return
        dispatcher = self._consumer.event_dispatcher
        if dispatcher is not None:
            dispatcher.send(f"task-{notice.what}", uuid=notice.task_id, name=notice.task)
        self._groups.count(notice)

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _wrap(self, stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Leave requests of shards to the intake, and hand all others on."""

        def on_task_request(request: Any) -> Any:
            if DELIVERY in (request.message.delivery_info or ()):
                return self._intake.take_request(request)
            for attribute in RUN_ATTRIBUTES:
                # Handed on past our publishing hook: with it, a claim would wait in a lane that there is not.
                request.request_dict.pop(attribute, None)
            self._strays.note(request)
            return stock(request)

        return on_task_request

    def _before_cancel(self, stock: Callable[[], Any]) -> Callable[[], Any]:
        """Start nothing more before a cold shutdown ends what runs: it does so long before it calls `stop`.

        This runs in a signal handler, in the middle of whatever the main thread does.
        """

        def cancel_active_requests() -> Any:
            self._stopping = True
            self._runs.stop()
            return stock()

        return cancel_active_requests

    def _is_alive(self) -> bool:
        """Say whether the broker was heard within one heartbeat; an owner that is cut off must start nothing more.

        The broker sends twice a heartbeat, and the main thread looks now and then whether something was read.
        """
        # kombu's `connection` would connect anew, in the middle of whatever asks.
        connection: Any = getattr(self._consumer.connection, "_connection", None)
        heartbeat_seconds = getattr(connection, "heartbeat", None)
        if not heartbeat_seconds or not connection.last_heartbeat_received:
            return True
        return bool(time.monotonic() - connection.last_heartbeat_received < 1.5 * heartbeat_seconds)

    def _connections(self) -> tuple[Any, ...]:
        """Return the connections that this worker's main thread sends heartbeats on."""
        return self._consumer.connection, getattr(self._consumer.event_dispatcher, "connection", None)

    def _slots(self) -> int:
        """Say how many runs the pool takes: none once the worker stops, since its pool may be gone already.

        A worker that is told to stop while it has no connection stops its pool, and never calls `stop` here.
        """
        pool = self._consumer.pool
        return max(1, pool.num_processes) if pool.active and not self._stopping else 0

    def _read(self) -> bool:
        """Read what the connection has received, and say whether that was anything."""
        connection = self._consumer.connection
        return connection is not None and read_what_came(connection)
