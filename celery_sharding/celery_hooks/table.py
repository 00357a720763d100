"""Every place where Celery, kombu, billiard or py-amqp is bent: what, why, when, and what was read for it.

One package for the app and for the worker, since both bend one Celery and a new version of it is read once. It stands
between the worker and all that publishes, so a hook may call the publisher as it is, and knows of the worker's core
only the protocols in `site`.

The hooks of a stage are installed in the order of this table. A test fails when the source of a `target`, or of what
stands in `reads`, is no longer what was read: read it again, mend the hook, and write down the new version and digest.
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
        install: What does it, as "module of this package:function"; None if nothing is installed.
        where: The module of ours that does it, if it is none of this package.
        reads: What else the hook relies on.
        version: Of the distribution that was read.
        digest: Of the source of `target` and `reads`, as `installer.read_digest` makes it.
    """

    stage: Stage
    target: str
    why: str
    version: str
    digest: str
    install: str | None = None
    where: str | None = None
    reads: tuple[str, ...] = ()


HOOKS = (
    Hook(
        Stage.APP,
        "celery.app.utils:Settings.table",
        why="our settings are shown without their passwords; the class of `app.conf` is replaced",
        install="app_settings:mask_settings",
        version="celery 5.7.0",
        digest="247878c46e36",
    ),
    Hook(
        Stage.APP,
        "celery.app.base:Celery.amqp",
        why="the router asks for sharded tasks first, the sender confirms them, -Q and -X know groups",
        install="amqp:replace_amqp",
        reads=(
            "celery.app.amqp:AMQP.Queues",
            "celery.app.amqp:AMQP.Router",
            "celery.app.amqp:AMQP.send_task_message",
            "celery.app.amqp:Queues",
        ),
        version="celery 5.7.0",
        digest="9022f83e8c7f",
    ),
    Hook(
        Stage.APP,
        "celery.app.base:Celery.annotations",
        why="`apply` of each task refuses in eager mode what a publish refuses; only annotations reach every task",
        install="eager:check_eager_calls",
        reads=(
            "celery.app.task:Task.annotate",
            "celery.app.task:Task.add_around",
            "celery.app.annotations:resolve_all",
        ),
        version="celery 5.7.0",
        digest="f875f31ec470",
    ),
    Hook(
        Stage.APP,
        "celery.app.base:Celery.send_task",
        why="it asks some result backends before it publishes, and lets their errors through without a word",
        install="send_task:name_backend_errors",
        version="celery 5.7.0",
        digest="0f94519120b9",
    ),
    Hook(
        Stage.APP,
        "celery.app.base:Celery.Worker",
        why="the command line shows a traceback for whatever it raises",
        install="worker_start:tell_start_errors",
        reads=("celery.app.base:Celery.worker_main",),
        version="celery 5.7.0",
        digest="857368c481cc",
    ),
    Hook(
        Stage.COMMANDS,
        "celery.worker.control:Panel.register",
        why="`cancel_consumer` and `add_consumer` know groups and shards; `inspect shards` shows them",
        install="commands:install_commands",
        reads=("celery.worker.control:cancel_consumer", "celery.worker.control:add_consumer", "kombu.pidbox:Node"),
        version="celery 5.7.0, kombu 5.7.0",
        digest="9d3a3a333d10",
    ),
    Hook(
        Stage.WORKER,
        "celery.worker.request:Request",
        why="the endings of a run from a shard lead to its lane, and its retries stay in their place",
        install="request:adapt_tasks",
        reads=(
            "celery.app.task:Task.retry",
            "celery.app.trace:TraceInfo.handle_retry",
            "celery.worker.request:create_request_cls",
        ),
        version="celery 5.7.0",
        digest="8d38968a655e",
    ),
    Hook(
        Stage.WORKER,
        "celery.concurrency.base:BasePool.apply_async",
        why="whatever happens when a run ends, it leaves its lane",
        install="run_exits:guard_exits",
        reads=(
            "celery.concurrency.base:apply_target",
            "celery.concurrency.gevent:apply_timeout",
            "celery.concurrency.gevent:TaskPool",
            "celery.concurrency.thread:TaskPool",
        ),
        version="celery 5.7.0",
        digest="992cc0f81b6d",
    ),
    Hook(
        Stage.WORKER,
        "celery.worker.control:revoke",
        why="it asks the result backend in the main thread, which sends no heartbeat while that does not answer",
        install="revoking:install_revoke",
        reads=("celery.worker.control:terminate", "celery.worker.control:_revoke"),
        version="celery 5.7.0",
        digest="febb72bd2aac",
    ),
    Hook(
        Stage.WORKER,
        "celery.worker.consumer.consumer:Consumer.__init__",
        why="strategies hand the requests of shards to their lanes, not to the pool",
        install="requests:take_requests",
        reads=("celery.worker.strategy:default",),
        version="celery 5.7.0",
        digest="844dcbf89fa6",
    ),
    Hook(
        Stage.WORKER,
        "celery.worker.consumer.consumer:Consumer.cancel_active_requests",
        why="a cold shutdown cancels what runs long before it stops our step: nothing may start meanwhile",
        install="requests:start_nothing_when_cancelling",
        version="celery 5.7.0",
        digest="2220d5efe4dc",
    ),
    Hook(
        Stage.WORKER,
        "celery.worker.consumer.consumer:Consumer.ensure_connected",
        why="tries come sooner and take the nodes in turn, and no answer is waited for without a limit",
        install="connecting:connect_within_limits",
        reads=("kombu.connection:Connection.ensure_connection", "kombu.connection:Connection.maybe_switch_next"),
        version="celery 5.7.0, kombu 5.7.0",
        digest="4051b1cd8d0e",
    ),
    Hook(
        Stage.WORKER,
        "celery.worker.loops:_enable_amqheartbeats",
        why="heartbeats are as short as our setting says; a closed channel ends the connection, not the worker",
        install="connecting:beat_often",
        reads=("celery.worker.consumer.consumer:Consumer.start", "celery.worker.consumer.consumer:Consumer.connect"),
        version="celery 5.7.0",
        digest="23df54efe34b",
    ),
    Hook(
        Stage.WORKER,
        "celery.worker.consumer.consumer:Consumer.perform_pending_operations",
        why="the loop for greenlets handles ten messages a second; and a heartbeat file must know that it turns",
        install="loop:follow_rounds",
        reads=("celery.worker.loops:synloop", "celery.worker.consumer.consumer:Consumer.shutdown"),
        version="celery 5.7.0",
        digest="d64f21bd1267",
    ),
    Hook(
        Stage.WORKER,
        "celery.concurrency.solo:TaskPool",
        why="a solo pool runs tasks in the thread that sends heartbeats",
        install="pool:surround_tasks",
        reads=("celery.concurrency.base:apply_target", "celery.concurrency.base:BasePool.apply_async"),
        version="celery 5.7.0",
        digest="ee7a89135327",
    ),
    Hook(
        Stage.STEPS,
        "kombu.pidbox:Node.handle_message",
        why="a command does not learn whether the worker was named by whoever sent it",
        install="commands:note_addressees",
        reads=("celery.worker.pidbox:Pidbox", "celery.worker.consumer.control:Control.__init__"),
        version="celery 5.7.0, kombu 5.7.0",
        digest="e6de2a5a6a98",
    ),
    Hook(
        Stage.STEPS,
        "celery.worker.consumer.control:Control.__init__",
        why="a worker whose name is taken connects again and again, and does not say why",
        install="naming:wait_for_name",
        reads=("celery.worker.pidbox:Pidbox.start", "kombu.pidbox:Mailbox.get_queue"),
        version="celery 5.7.0, kombu 5.7.0",
        digest="6c1ecb196a57",
    ),
    Hook(
        Stage.CONNECT,
        "celery.concurrency.asynpool:AsynPool.flush",
        why="it strikes off runs that a child was sent and has not reported as begun",
        install="prefork:guard_flush",
        reads=(
            "celery.concurrency.prefork:TaskPool.on_start",
            "celery.worker.consumer.consumer:Consumer.on_close",
            "celery.concurrency.asynpool:AsynPool.register_with_event_loop",
        ),
        version="celery 5.7.0",
        digest="82bfbe97c4ba",
    ),
    Hook(
        Stage.CALLED,
        "celery.concurrency.asynpool:AsynPool._track_child_process",
        why="a child whose end was told once has no descriptor any more: `prefork.listen_anew` lets it get one",
        reads=("celery.concurrency.asynpool:AsynPool._untrack_child_process",),
        version="celery 5.7.0",
        digest="00a5f4d56789",
    ),
    Hook(
        Stage.CALLED,
        "celery.concurrency.asynpool:AsynPool._create_write_handlers",
        why="`prefork.direct_writer` writes a run to a child now; `cut_off` strikes off what none was handed",
        reads=("celery.concurrency.asynpool:AsynPool.__init__", "billiard.pool:ApplyResult"),
        version="celery 5.7.0, billiard 4.3.2",
        digest="f5dfa0680943",
    ),
    Hook(
        Stage.CALLED,
        "celery.worker.worker:WorkController._process_task_sem",
        why="`pool.submit` gives the place in the pool back that Celery takes for a run which cannot be handed over",
        reads=(
            "celery.worker.components:Pool.create",
            "celery.worker.worker:WorkController._process_task",
        ),
        version="celery 5.7.0",
        digest="b69a44782e70",
    ),
    Hook(
        Stage.CALLED,
        "kombu.connection:Connection.connection",
        why="it connects anew when it is asked for a lost connection: `heartbeats` reads what it keeps",
        reads=("kombu.connection:Connection.connected", "amqp.connection:Connection.heartbeat_tick"),
        version="kombu 5.7.0, amqp 5.4.2",
        digest="3d24e47bd487",
    ),
    Hook(
        Stage.CALLED,
        "celery.app.base:Celery.tasks",
        why="it makes all tasks of an app: `tasks` reads those that are made",
        reads=("celery.app.base:Celery.finalize",),
        version="celery 5.7.0",
        digest="dc0f39e5b364",
    ),
    Hook(
        Stage.CALLED,
        "celery.worker.consumer.consumer:Consumer.reset_rate_limits",
        why="a bucket is hidden from the strategy, and asked when the message is at the head of its lane",
        where="worker.consume.receiver",
        version="celery 5.7.0",
        digest="05a7ef951625",
    ),
    Hook(
        Stage.CALLED,
        "celery.app.task:Task.__call__",
        why="a publish for a run is known by the stack of tasks",
        where="publish.patience",
        reads=("celery.utils.threads:_FastLocalStack",),
        version="celery 5.7.0",
        digest="85945bfe4d84",
    ),
    Hook(
        Stage.CALLED,
        "amqp.channel:Channel._basic_publish",
        why="properties are measured before they are sent, and it is seen whether any of a message has left",
        where="publish.connection, worker.log_writer",
        reads=("amqp.method_framing:frame_writer", "amqp.serialization:GenericContent._serialize_properties"),
        version="amqp 5.4.2",
        digest="4bc8a4105d1a",
    ),
    Hook(
        Stage.CALLED,
        "amqp.connection:Connection.blocking_read",
        why="no read goes on beyond a deadline, whoever reads",
        where="rabbitmq.connect",
        version="amqp 5.4.2",
        digest="0ee5f0a621dc",
    ),
    Hook(
        Stage.CALLED,
        "kombu.connection:Connection._connection_factory",
        why="no try to connect begins after the deadline, or waits beyond it",
        where="rabbitmq.connect",
        reads=(
            "kombu.connection:Connection._ensure_connection",
            "kombu.transport.pyamqp:Transport.establish_connection",
        ),
        version="kombu 5.7.0",
        digest="42c6a3a0e90e",
    ),
    Hook(
        Stage.CALLED,
        "amqp.channel:Channel._on_basic_deliver",
        why="a message whose properties cannot be read must not end the connection",
        where="rabbitmq.foreign",
        reads=(
            "amqp.abstract_channel:AbstractChannel.dispatch_method",
            "amqp.serialization:decode_properties_basic",
            "amqp.serialization:GenericContent",
        ),
        version="amqp 5.4.2",
        digest="b158db8ae19a",
    ),
    Hook(
        Stage.CALLED,
        "amqp.channel:Channel._on_close",
        why="many consumers are asked for at once, and each refusal is noted by its channel",
        where="rabbitmq.pipelining, rabbitmq.confirms",
        reads=("amqp.channel:Channel._setup_listeners", "amqp.channel:Channel.confirm_select"),
        version="amqp 5.4.2",
        digest="a80d33ef94a7",
    ),
)
"""In the order in which they are installed."""
