"""Every place where Celery, kombu, billiard or py-amqp is bent: what, why, when, and what was read for it.

One package for the app and for the worker, since both bend one Celery and a new version of it is read once. It stands
between the worker and all that publishes, so a hook may call the publisher as it is, and knows of the worker's core
only the protocols in `site`.

The hooks of a stage are installed in the order in which they stand here. A test fails when the source of a `target`, or
of what stands in `reads`, is no longer what was read: read it again, mend the hook, and write down version and digest.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Stage(enum.Enum):
    """When a hook is installed."""

    APP = enum.auto()
    """`Sharding(app)` is made."""
    COMMANDS = enum.auto()
    """Celery's command line is loaded, or a worker starts; once in a process."""
    WORKER = enum.auto()
    """The worker's bootstep is made: before strategies are, and before the pool forks."""
    STEPS = enum.auto()
    """The steps of Celery that the bootstep requires are made, too."""
    CONNECT = enum.auto()
    """The worker has connected, and consumes next; at each connect."""
    CALLED = enum.auto()
    """Nothing is installed: the code of ours that reaches in is called when it is needed."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One place where Celery is bent.

    Attributes:
        target: What is replaced, extended or reached into, as "module:name".
        by: What does it: "module of this package:function", which is installed; else the place that is called.
        reads: What else the hook relies on.
        digest: Of the source of `target` and `reads`, as `installer.read_digest` makes it.
        read_in: The versions that were read.
    """

    target: str
    why: str
    by: str
    digest: str
    reads: tuple[str, ...] = ()
    read_in: str = "celery 5.7.0"


HOOKS: dict[Stage, tuple[Hook, ...]] = {
    Stage.APP: (
        Hook(
            "celery.app.utils:Settings.table",
            why="our settings are shown without their passwords; the class of `app.conf` is replaced",
            by="app_settings:mask_settings",
            digest="247878c46e36",
        ),
        Hook(
            "celery.app.base:Celery.amqp",
            why="the router asks for sharded tasks first, the sender confirms them, -Q and -X know groups",
            by="amqp:replace_amqp",
            reads=(
                "celery.app.amqp:AMQP.Queues",
                "celery.app.amqp:AMQP.Router",
                "celery.app.amqp:AMQP.send_task_message",
                "celery.app.amqp:Queues",
            ),
            digest="9022f83e8c7f",
        ),
        Hook(
            "celery.app.base:Celery.annotations",
            why="`apply` of each task refuses in eager mode what a publish refuses; only annotations reach every task",
            by="eager:check_eager_calls",
            reads=(
                "celery.app.task:Task.annotate",
                "celery.app.task:Task.add_around",
                "celery.app.annotations:resolve_all",
            ),
            digest="f875f31ec470",
        ),
        Hook(
            "celery.app.base:Celery.send_task",
            why="it asks some result backends before it publishes, and lets their errors through without a word",
            by="send_task:name_backend_errors",
            digest="0f94519120b9",
        ),
        Hook(
            "celery.app.base:Celery.Worker",
            why="the command line shows a traceback for whatever it raises",
            by="worker_start:tell_start_errors",
            reads=("celery.app.base:Celery.worker_main",),
            digest="857368c481cc",
        ),
    ),
    Stage.COMMANDS: (
        Hook(
            "celery.worker.control:Panel.register",
            why="`cancel_consumer` and `add_consumer` know groups and shards; `inspect shards` shows them",
            by="commands:install_commands",
            reads=("celery.worker.control:cancel_consumer", "celery.worker.control:add_consumer", "kombu.pidbox:Node"),
            digest="9d3a3a333d10",
            read_in="celery 5.7.0, kombu 5.7.0",
        ),
    ),
    Stage.WORKER: (
        Hook(
            "celery.worker.request:Request",
            why="the endings of a run from a shard lead to its lane, and its retries stay in their place",
            by="request:adapt_tasks",
            reads=(
                "celery.app.task:Task.retry",
                "celery.app.trace:TraceInfo.handle_retry",
                "celery.worker.request:create_request_cls",
            ),
            digest="8d38968a655e",
        ),
        Hook(
            "celery.concurrency.base:BasePool.apply_async",
            why="whatever happens when a run ends, it leaves its lane",
            by="run_exits:guard_exits",
            reads=(
                "celery.concurrency.base:apply_target",
                "celery.concurrency.gevent:apply_timeout",
                "celery.concurrency.gevent:TaskPool",
                "celery.concurrency.thread:TaskPool",
            ),
            digest="992cc0f81b6d",
        ),
        Hook(
            "celery.worker.control:revoke",
            why="it asks the result backend in the main thread, which sends no heartbeat while that does not answer",
            by="revoking:install_revoke",
            reads=("celery.worker.control:terminate", "celery.worker.control:_revoke"),
            digest="febb72bd2aac",
        ),
        Hook(
            "celery.worker.consumer.consumer:Consumer.__init__",
            why="strategies hand the requests of shards to their lanes, not to the pool",
            by="requests:take_requests",
            reads=("celery.worker.strategy:default",),
            digest="844dcbf89fa6",
        ),
        Hook(
            "celery.worker.consumer.consumer:Consumer.cancel_active_requests",
            why="a cold shutdown cancels what runs long before it stops our step: nothing may start meanwhile",
            by="requests:start_nothing_when_cancelling",
            digest="2220d5efe4dc",
        ),
        Hook(
            "celery.worker.consumer.consumer:Consumer.ensure_connected",
            why="tries come sooner and take the nodes in turn, and no answer is waited for without a limit",
            by="connecting:connect_within_limits",
            reads=("kombu.connection:Connection.ensure_connection", "kombu.connection:Connection.maybe_switch_next"),
            digest="4051b1cd8d0e",
            read_in="celery 5.7.0, kombu 5.7.0",
        ),
        Hook(
            "celery.worker.loops:_enable_amqheartbeats",
            why="heartbeats are as short as our setting says; a closed channel ends the connection, not the worker",
            by="connecting:beat_often",
            reads=(
                "celery.worker.consumer.consumer:Consumer.start",
                "celery.worker.consumer.consumer:Consumer.connect",
            ),
            digest="23df54efe34b",
        ),
        Hook(
            "celery.worker.consumer.consumer:Consumer.perform_pending_operations",
            why="the loop for greenlets handles ten messages a second; and a heartbeat file must know that it turns",
            by="loop:follow_rounds",
            reads=("celery.worker.loops:synloop", "celery.worker.consumer.consumer:Consumer.shutdown"),
            digest="d64f21bd1267",
        ),
        Hook(
            "celery.concurrency.solo:TaskPool",
            why="a solo pool runs tasks in the thread that sends heartbeats",
            by="pool:surround_tasks",
            reads=("celery.concurrency.base:apply_target", "celery.concurrency.base:BasePool.apply_async"),
            digest="ee7a89135327",
        ),
    ),
    Stage.STEPS: (
        Hook(
            "kombu.pidbox:Node.handle_message",
            why="a command does not learn whether the worker was named by whoever sent it",
            by="commands:note_addressees",
            reads=("celery.worker.pidbox:Pidbox", "celery.worker.consumer.control:Control.__init__"),
            digest="e6de2a5a6a98",
            read_in="celery 5.7.0, kombu 5.7.0",
        ),
        Hook(
            "celery.worker.consumer.control:Control.__init__",
            why="a worker whose name is taken connects again and again, and does not say why",
            by="naming:wait_for_name",
            reads=("celery.worker.pidbox:Pidbox.start", "kombu.pidbox:Mailbox.get_queue"),
            digest="6c1ecb196a57",
            read_in="celery 5.7.0, kombu 5.7.0",
        ),
    ),
    Stage.CONNECT: (
        Hook(
            "celery.concurrency.asynpool:AsynPool.flush",
            why="it strikes off runs that a child was sent and has not reported as begun",
            by="prefork:guard_flush",
            reads=(
                "celery.concurrency.prefork:TaskPool.on_start",
                "celery.worker.consumer.consumer:Consumer.on_close",
                "celery.concurrency.asynpool:AsynPool.register_with_event_loop",
            ),
            digest="82bfbe97c4ba",
        ),
    ),
    Stage.CALLED: (
        Hook(
            "celery.worker.loops:asynloop",
            why="the sockets of a connection that is lost before the loop runs stay in the poller: they are taken out",
            by="connecting",
            reads=(
                "kombu.asynchronous.hub:Hub.reset",
                "kombu.asynchronous.hub:Hub._close",
                "kombu.asynchronous.hub:Hub._pop_ready",
                "kombu.transport.base:Transport._make_reader",
            ),
            digest="1a5a6f8fae61",
            read_in="celery 5.7.0, kombu 5.7.0",
        ),
        Hook(
            "celery.concurrency.asynpool:AsynPool._track_child_process",
            why="a child whose end was told once has no descriptor any more: `prefork.listen_anew` lets it get one",
            by="prefork",
            reads=("celery.concurrency.asynpool:AsynPool._untrack_child_process",),
            digest="00a5f4d56789",
        ),
        Hook(
            "celery.concurrency.asynpool:AsynPool._create_write_handlers",
            why="`prefork.DirectWriter` writes a run to a child now; `cut_off` strikes off what none was handed",
            by="prefork",
            reads=("celery.concurrency.asynpool:AsynPool.__init__", "billiard.pool:ApplyResult"),
            digest="f5dfa0680943",
            read_in="celery 5.7.0, billiard 4.3.2",
        ),
        Hook(
            "celery.worker.worker:WorkController._process_task_sem",
            why="`pool.submit` gives the place in the pool back that Celery takes for a run that cannot begin",
            by="pool",
            reads=("celery.worker.components:Pool.create", "celery.worker.worker:WorkController._process_task"),
            digest="b69a44782e70",
        ),
        Hook(
            "kombu.connection:Connection.connection",
            why="it connects anew when it is asked for a lost connection: `heartbeats` reads what it keeps",
            by="heartbeats",
            reads=("kombu.connection:Connection.connected", "amqp.connection:Connection.heartbeat_tick"),
            digest="3d24e47bd487",
            read_in="kombu 5.7.0, amqp 5.4.2",
        ),
        Hook(
            "celery.app.base:Celery.tasks",
            why="it makes all tasks of an app: `tasks` reads those that are made",
            by="tasks",
            reads=("celery.app.base:Celery.finalize",),
            digest="dc0f39e5b364",
        ),
        Hook(
            "celery.worker.consumer.consumer:Consumer.reset_rate_limits",
            why="a bucket is hidden from the strategy; it is asked when the message is at the head of its lane",
            by="rate_limits",
            digest="05a7ef951625",
        ),
        Hook(
            "celery.app.task:Task.__call__",
            why="a publish for a run is known by the stack of tasks",
            by="client",
            reads=("celery.utils.threads:_FastLocalStack",),
            digest="85945bfe4d84",
        ),
        Hook(
            "amqp.channel:Channel._basic_publish",
            why="properties are measured before they are sent, and it is seen whether any of a message has left",
            by="client",
            reads=("amqp.method_framing:frame_writer", "amqp.serialization:GenericContent._serialize_properties"),
            digest="4bc8a4105d1a",
            read_in="amqp 5.4.2",
        ),
        Hook(
            "amqp.connection:Connection.blocking_read",
            why="no read goes on beyond a deadline, whoever reads",
            by="client",
            digest="0ee5f0a621dc",
            read_in="amqp 5.4.2",
        ),
        Hook(
            "kombu.connection:Connection._connection_factory",
            why="no try to connect begins after the deadline, or waits beyond it",
            by="client",
            reads=(
                "kombu.connection:Connection._ensure_connection",
                "kombu.transport.pyamqp:Transport.establish_connection",
            ),
            digest="42c6a3a0e90e",
            read_in="kombu 5.7.0",
        ),
        Hook(
            "amqp.channel:Channel._on_basic_deliver",
            why="a message whose properties cannot be read must not end the connection",
            by="foreign",
            reads=(
                "amqp.abstract_channel:AbstractChannel.dispatch_method",
                "amqp.serialization:decode_properties_basic",
                "amqp.serialization:GenericContent",
            ),
            digest="b158db8ae19a",
            read_in="amqp 5.4.2",
        ),
        Hook(
            "amqp.channel:Channel._on_close",
            why="many consumers are asked for at once, and each refusal is noted by its channel",
            by="client",
            reads=("amqp.channel:Channel._setup_listeners", "amqp.channel:Channel.confirm_select"),
            digest="a80d33ef94a7",
            read_in="amqp 5.4.2",
        ),
        Hook(
            "celery.concurrency.base:BasePool.__init__",
            why="on an embedded broker lanes go on in the thread that would wait for a slot",
            by="pool",
            reads=("billiard.pool:Pool.apply_async",),
            digest="321842fc67f9",
            read_in="celery 5.7.0, billiard 4.3.2",
        ),
        Hook(
            "celery.backends.redis:RedisBackend._create_client",
            why="claims have connections of their own, which wait for an answer less long than those for results",
            by="dedup.stores.opening",
            digest="009711004757",
        ),
        Hook(
            "kombu.transport.virtual.base:Channel",
            why="the embedded brokers hash keys over shards, and keep messages in order",
            by="brokers.embedded",
            reads=("kombu.transport.memory:Channel", "kombu.transport.sqlalchemy:Channel"),
            digest="af4456c5f05e",
            read_in="kombu 5.7.0",
        ),
    ),
}
