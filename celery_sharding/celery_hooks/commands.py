"""Remote control: `cancel_consumer` and `add_consumer` know groups and shards, and `inspect shards` lists them.

    celery -A shop control cancel_consumer orders.003     gives the shard up in order; also `orders` or `orders/3`
    celery -A shop control add_consumer orders.003        takes it again
    celery -A shop inspect shards                         by group: each queue, and whether the worker owns it, stands
                                                          by, is leaving it, or leaves it alone because it is paused

A cancelled shard stays off across reconnects, until it is added or the worker restarts. A command without `-d` reaches
every worker: each takes back what it gave up, and leaves alone what it was not started with. A worker that is named
with `-d` takes the shard. Each reply says what the worker did; an unknown shard is an error. Every other name is
Celery's. `active_queues` is unchanged: its readers (Flower, autoscalers) would act on the names as on ordinary queues.
"""

from __future__ import annotations

from typing import Any

from celery.worker.consumer.control import Control
from celery.worker.control import Panel, control_command, inspect_command

from celery_sharding.celery_hooks.site import Shards, WorkerSite
from celery_sharding.errors import UnknownShard
from celery_sharding.shard_names import describe_near_miss, parse_shard

INSPECT = "shards"
_BY_NAME = "was_named"


class _ShardCommand:
    """Stands in front of one of Celery's commands, and takes what names groups and shards."""

    def __init__(self, name: str) -> None:
        self._stock = Panel.data[name]

    def __call__(self, state: Any, queue: str, **options: Any) -> dict[str, Any]:
        shards = _shards_of(state)
        if shards is None:
            return self._stock(state, queue, **options)  # type: ignore[no-any-return]
        settings = state.app.sharding.settings
        found = parse_shard(queue, settings)
        if found is None:
            reply = self._stock(state, queue, **options)
            near = "" if queue in state.app.amqp.queues else describe_near_miss(queue, settings)
            return {"ok": f"{reply['ok']}; {near}"} if near and "ok" in reply else reply
        group, index = found
        try:
            return {"ok": self.act(shards, group.name, index, was_named=getattr(state, _BY_NAME, False))}
        except UnknownShard as exc:
            return {"error": str(exc)}

    def act(self, shards: Shards, group: str, index: int | None, *, was_named: bool) -> str:
        """Do it, and return the reply."""
        raise NotImplementedError


class _Cancel(_ShardCommand):
    def act(self, shards: Shards, group: str, index: int | None, *, was_named: bool) -> str:
        had = shards.cancel_shards(group, index)
        return f"{'no longer consuming from' if had else 'was not consuming from'} {_name(group, index)}"


class _Add(_ShardCommand):
    def act(self, shards: Shards, group: str, index: int | None, *, was_named: bool) -> str:
        taken = shards.add_shards(group, index, by_name=was_named)
        if taken is None:
            return f"add consumer {group}"
        if taken:
            return f"add consumer {', '.join(_name(group, each) for each in sorted(taken))}"
        return (
            f"left {_name(group, index)} alone: this worker was not started with it, and was not named; -d with its "
            "name makes it take it"
        )


def install_commands(*_: Any) -> None:
    """Put groups in front of Celery's two commands, and add one that inspects, once in a process.

    The command line does it, too: it sends only what it knows.
    """
    for name, command in (("cancel_consumer", _Cancel), ("add_consumer", _Add)):
        facts = Panel.meta[name]
        if not isinstance(Panel.data[name], _ShardCommand):
            control_command(name=name, help=facts.help, signature=facts.signature, args=facts.args)(command(name))
    if INSPECT not in Panel.data:
        inspect_command(name=INSPECT)(_inspect_shards)


def note_addressees(site: WorkerSite) -> None:
    """Let commands know whether whoever sent them named this worker.

    kombu calls a command with its arguments and the state of the mailbox's node, and keeps whom it was sent to.
    """
    for step in site.consumer.steps:
        if isinstance(step, Control):
            _note_addressees(step.box.node)


def _note_addressees(node: Any) -> None:
    stock = node.handle_message

    def handle_message(body: Any, message: Any = None) -> Any:
        node.state[_BY_NAME] = bool(body.get("destination"))
        return stock(body, message)

    node.handle_message = handle_message


def _inspect_shards(state: Any) -> dict[str, Any]:
    """List the shard queues of a worker by group: whether it owns each, stands by, is leaving it, or it is paused."""
    shards = _shards_of(state)
    return {} if shards is None else dict(shards.roles())


def _shards_of(state: Any) -> Shards | None:
    found: Shards | None = getattr(state.consumer, "shards", None)
    return found


def _name(group: str, index: int | None) -> str:
    return group if index is None else f"{group}.{index:03d}"
