"""Remote control of what a running worker consumes: `cancel_consumer` and `add_consumer` know groups and shards, and
`inspect shards` shows them.

    celery -A shop control cancel_consumer orders.003     gives the shard up in order; the same for `orders`, `orders/3`
    celery -A shop control add_consumer orders.003        takes it again
    celery -A shop inspect shards                         by group: each queue, and whether the worker owns it, stands
                                                          by, is leaving it, or leaves it alone because it is paused

What was cancelled stays off when the worker connects anew, until it is added or the worker is started again. A shard
that the group does not have is an error in the reply; every other name is Celery's. `active_queues` stays what it is:
those who read it (Flower, autoscalers) go on to act on the names, as on those of ordinary queues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.worker.control import Panel, control_command, inspect_command

from celery_sharding.config import parse_shard
from celery_sharding.errors import UnknownShard

if TYPE_CHECKING:
    from celery_sharding.worker.groups import Groups


INSPECT = "shards"


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


def _with_groups(
    stock: Callable[..., Any], act: Callable[[Groups, str, int | None], str]
) -> Callable[..., dict[str, Any]]:
    def command(state: Any, queue: str, **options: Any) -> dict[str, Any]:
        groups: Groups | None = getattr(state.consumer, "shards", None)
        found = None if groups is None else parse_shard(queue, state.app.sharding.settings)
        if groups is None or found is None:
            return stock(state, queue, **options)  # type: ignore[no-any-return]
        group, index = found
        try:
            return {"ok": f"{act(groups, group.name, index)} {queue}"}
        except UnknownShard as exc:
            return {"error": str(exc)}

    command.knows_groups = True  # type: ignore[attr-defined]
    return command


def _inspect_shards(state: Any) -> dict[str, dict[str, str]]:
    """List the shard queues of a worker by group: whether it owns each, stands by, is leaving it, or it is paused."""
    groups: Groups | None = getattr(state.consumer, "shards", None)
    return {} if groups is None else groups.roles()


def _cancel_shards(groups: Groups, group: str, index: int | None) -> str:
    groups.cancel_shards(group, index)
    return "no longer consuming from"


def _add_shards(groups: Groups, group: str, index: int | None) -> str:
    groups.add_shards(group, index)
    return "add consumer"
