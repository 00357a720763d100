"""Remote control of what a running worker consumes: `cancel_consumer` and `add_consumer` know groups and shards, and
`inspect shards` shows them.

    celery -A shop control cancel_consumer orders.003     gives the shard up in order; the same for `orders`, `orders/3`
    celery -A shop control add_consumer orders.003        takes it again
    celery -A shop inspect shards                         by group: each queue, and whether the worker owns it, stands
                                                          by, is leaving it, or leaves it alone because it is paused

What was cancelled stays off when the worker connects anew, until it is added or the worker is started again. A command
without `-d` reaches every worker: then each takes back what it gave up, and a worker that was started without the shard
leaves it alone; one that is named takes it. Each says in its reply what it did. A shard that the group does not have is
an error in the reply; every other name is Celery's. `active_queues` stays what it is:
those who read it (Flower, autoscalers) go on to act on the names, as on those of ordinary queues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.worker.consumer.control import Control
from celery.worker.control import Panel, control_command, inspect_command

from celery_sharding.errors import UnknownShard
from celery_sharding.shard_names import describe_near_miss, parse_shard

if TYPE_CHECKING:
    from celery_sharding.worker.consume.groups import Groups


INSPECT = "shards"
_BY_NAME = "was_named"


def install_commands() -> None:
    """Put groups in front of Celery's two commands, and add one that inspects, once in a process.

    The command line does it, too: it sends only what it knows.

    A command is replaced by registering another of its name, which is public. That a command finds its consumer as
    `state.consumer`, that it is registered with what `Panel.meta` tells of it, and that its reply is {"ok": …} or
    {"error": …} is read of Celery 5.7.0.
    """
    for name, act in (("cancel_consumer", _cancel_shards), ("add_consumer", _add_shards)):
        stock, facts = Panel.data[name], Panel.meta[name]
        if not hasattr(stock, "knows_groups"):
            command = _with_groups(stock, act)
            control_command(name=name, help=facts.help, signature=facts.signature, args=facts.args)(command)
    if INSPECT not in Panel.data:
        inspect_command(name=INSPECT)(_inspect_shards)


def note_addressees(consumer: Any) -> None:
    """Let commands know whether the worker of `consumer`, Celery's, was named by whoever sent them.

    Kombu calls a command with its arguments and the state of the mailbox's node, and keeps whom it was sent to for
    itself; that `Control` has the node as `box.node`, which is given each message, is read of Celery 5.7.0.
    """
    for step in consumer.steps:
        if isinstance(step, Control):
            node = step.box.node
            node.handle_message = _noting(node, node.handle_message)


def _noting(node: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    def handle_message(body: Any, message: Any = None) -> Any:
        node.state[_BY_NAME] = bool(body.get("destination"))
        return stock(body, message)

    return handle_message


def _with_groups(
    stock: Callable[..., Any], act: Callable[[Groups, str, int | None, bool], str]
) -> Callable[..., dict[str, Any]]:
    def command(state: Any, queue: str, **options: Any) -> dict[str, Any]:
        groups: Groups | None = getattr(state.consumer, "shards", None)
        if groups is None:
            return stock(state, queue, **options)  # type: ignore[no-any-return]
        settings = state.app.sharding.settings
        found = parse_shard(queue, settings)
        if found is None:
            reply = stock(state, queue, **options)
            near = "" if queue in state.app.amqp.queues else describe_near_miss(queue, settings)
            return {"ok": f"{reply['ok']}; {near}"} if near and "ok" in reply else reply
        group, index = found
        try:
            return {"ok": act(groups, group.name, index, getattr(state, _BY_NAME, False))}
        except UnknownShard as exc:
            return {"error": str(exc)}

    command.knows_groups = True  # type: ignore[attr-defined]
    return command


def _inspect_shards(state: Any) -> dict[str, dict[str, str]]:
    """List the shard queues of a worker by group: whether it owns each, stands by, is leaving it, or it is paused."""
    groups: Groups | None = getattr(state.consumer, "shards", None)
    return {} if groups is None else groups.roles()


def _cancel_shards(groups: Groups, group: str, index: int | None, _by_name: bool) -> str:
    had = groups.cancel_shards(group, index)
    return f"{'no longer consuming from' if had else 'was not consuming from'} {_name(group, index)}"


def _add_shards(groups: Groups, group: str, index: int | None, by_name: bool) -> str:
    taken = groups.add_shards(group, index, by_name=by_name)
    if taken is None:
        return f"add consumer {group}"
    if taken:
        return f"add consumer {', '.join(_name(group, each) for each in sorted(taken))}"
    return (
        f"left {_name(group, index)} alone: this worker was not started with it, and was not named; -d with its name "
        "makes it take it"
    )


def _name(group: str, index: int | None) -> str:
    return group if index is None else f"{group}.{index:03d}"
