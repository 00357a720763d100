"""The bootstep that makes a Celery worker consume its groups.

It decides when; `groups` knows what. It comes after Celery's own steps that consume, so it stops before them. It lives
as long as the consumer: `start` and `stop` are called for each connection, `shutdown` once.

    start                      at each connect: check each group on the broker, and recover it if its ring is lost
    register_with_event_loop   consume: a prefork pool takes no work earlier. Pools without a loop consume in `start`
    stop                       the connection is lost: forget what it delivered. The worker stops: freeze the lanes, and
                               close the channels of idle shards
    shutdown                   the pool has drained: close the other channels, which returns the rest in order

Celery's warm shutdown cancels its consumer, lets the pool drain, and calls `shutdown` last. Order survives it because
`stop` freezes the lanes and closes idle shards; a timer that fires in between finds its lane frozen. In a prefork pool
a shard is closed as soon as its last run has ended, since the pool itself takes a second or more to end. A cold
shutdown begins in a signal handler, by cancelling what runs: from then on nothing may start.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker.consumer.control import Control
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.tasks import Tasks

from celery_sharding.celery_hooks.connecting import WorkerConnection
from celery_sharding.celery_hooks.installer import install_hooks
from celery_sharding.celery_hooks.loop import loop_of
from celery_sharding.celery_hooks.naming import describe_process
from celery_sharding.celery_hooks.pool import WorkerPool
from celery_sharding.celery_hooks.prefork import DirectWriter, PreforkPool
from celery_sharding.celery_hooks.site import WorkerSite
from celery_sharding.celery_hooks.table import Stage
from celery_sharding.dedup.notices import Notices
from celery_sharding.errors import ShardingError
from celery_sharding.worker.calls import Calls
from celery_sharding.worker.claim_notices import ClaimNotices
from celery_sharding.worker.consume.groups import Groups
from celery_sharding.worker.consume.receiver import Intake
from celery_sharding.worker.consume.strays import Strays
from celery_sharding.worker.executor import Executor
from celery_sharding.worker.heartbeat.child_guard import ChildGuard
from celery_sharding.worker.heartbeat.pulse import Pulse, prepare_with_pulse
from celery_sharding.worker.heartbeat.watchdog import Watchdog
from celery_sharding.worker.host import WorkerHost
from celery_sharding.worker.run.state_writer import StateWriter
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

REPAIR_SECONDS = 10.0
TICK_SECONDS = 1.0


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
        backing = sharding.backing()
        sharded = sharding.rules.groups_of(c.app.tasks)
        sharding.log_warnings(c.app.amqp.queues.warnings, worker=True)
        connection = WorkerConnection(c)
        pool = WorkerPool(c)
        sharding.check_stores(has_child_processes=pool.has_children)
        self._calls = calls = Calls(c)
        # The main thread of a solo pool runs the tasks: another thread could not wake it.
        pulse = Pulse(connection) if pool.is_solo else None
        log = backing.open_log(calls, inline=pulse)
        states = StateWriter(c.app, calls, is_green=pool.is_green)
        loop = loop_of(c, pool, connection, calls)
        self._executor = executor = Executor(pool, calls, log, states, node=c.hostname, loop=loop)
        intake = Intake(c, executor, sharded)
        self._children = PreforkPool(c) if c.hub and pool.has_children else None
        self._watchdog = (
            Watchdog(connection, self._children, executor, ChildGuard()) if self._children is not None else None
        )
        services = WorkerServices(
            node=c.hostname,
            log=log,
            calls=calls,
            executor=executor,
            receiver=intake,
            hold_seconds=sharding.settings.consumer_timeout_seconds / 2,
        )
        self._host = host = WorkerHost(pool, executor, self._children)
        self._groups = groups = Groups(c, backing, sharding.selection(), host=host, services=services)
        self._shutdown = Shutdown(groups, log=log, states=states, calls=calls)
        self._notices = Notices(ClaimNotices(c, executor.waits, groups))  # before the pool forks
        self._looks = {TICK_SECONDS: groups.tick, REPAIR_SECONDS: groups.repair_soon} if backing.has_logs else {}
        self._timers: list[Any] = []
        c.shards, c.shards_states = groups, states  # where commands of remote control find them
        self._site = c.shards_site = WorkerSite(
            consumer=c,
            pool=pool,
            connection=connection,
            requests=intake,
            strays=Strays(sharded),
            runs=executor,
            shards=groups,
            heartbeat_seconds=sharding.settings.heartbeat_seconds,
            sharded=sharded,
            reads_more=pool.is_green and backing.has_logs,
            around_tasks=[] if pulse is None else [pulse],
        )
        install_hooks(Stage.COMMANDS)
        install_hooks(Stage.WORKER, self._site)

    def create(self, c: Any) -> None:
        """Take hold of the steps that this one requires; they are there by now."""
        install_hooks(Stage.STEPS, self._site)

    def start(self, c: Any) -> None:
        """Look at the broker, and consume if the pool has no event loop."""
        c.app.sharding.consumer_thread = threading.get_ident()
        install_hooks(Stage.CONNECT, self._site)
        if self._children is not None:
            self._children.prepare()
        try:
            prepare_with_pulse(c.connection, self._groups)
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
        self._executor.begin(DirectWriter(c.pool, hub) if self._children is not None else None)
        if self._watchdog is not None:
            self._watchdog.start()
        self._consume(c)

    def stop(self, c: Any) -> None:
        """Forget a lost connection, or freeze before the pool drains."""
        if c.blueprint.state != bootsteps.RUN:
            self._site.pool.stop()
            # The ends of a prefork pool's runs come in this thread, while the pool drains.
            self._executor.stop(self._shutdown if self._children is not None else None)
            self._shutdown.begin()
            return
        self._site.connection.leave_node()
        self._cancel_timers()
        self._groups.drop()
        self._host.kill_orphans(is_flushed=True)
        self._site.connection.forget_sockets()

    terminate = stop

    def shutdown(self, c: Any) -> None:
        """Close the channels that are left; every run that could end has ended."""
        self._cancel_timers()
        self._calls.stop()
        self._notices.read()
        self._shutdown.end()
        c.app.sharding.consumer_thread = None

    def info(self, c: Any) -> dict[str, Any]:
        """Return what `celery inspect stats` shows."""
        return {"shards": self._groups.indexes(), **describe_process()}

    def _consume(self, c: Any) -> None:
        self._groups.open()
        self._timers = [c.timer.call_repeatedly(TICK_SECONDS, self._notices.read)]
        self._timers += [c.timer.call_repeatedly(seconds, call) for seconds, call in self._looks.items()]

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
