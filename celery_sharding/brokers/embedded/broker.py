"""What differs between the embedded brokers: where messages wait, who may consume them, and how they are read."""

from __future__ import annotations

from typing import Any, Protocol

from kombu.transport.virtual.base import Message

from celery_sharding.errors import LockHeld, TopologyMismatch
from celery_sharding.topology import Names


class EmbeddedBroker(Protocol):
    """One embedded broker, as this process sees it.

    Attributes:
        errors: What its channels raise when a message was not stored.
        channel_class: The virtual channel that reads shard queues. Opened on a transport; acknowledged from any thread.
    """

    errors: tuple[type[Exception], ...]
    channel_class: type[Any]

    def arrange(self, channel: Any, names: Names, shards: int) -> None:
        """Give the group the queues of `shards` shards, all at once, and bind them in this process.

        Raises:
            TopologyMismatch: It has another number of shards, and messages wait in them.
            LockHeld: It has another number of shards, and a worker consumes them.
        """

    def lock(self, group: str, *, owner: str) -> None:
        """Become the one worker of the group; a second call by the same owner changes nothing.

        Raises:
            LockHeld: Another worker consumes the group.
        """

    def unlock_all(self) -> None:
        """Release all locks of this worker."""

    def after_fork(self) -> None:
        """Give up what a forked child inherited; called in the child before it publishes.

        Raises:
            BrokerUnavailable: The broker stayed in the parent.
        """


class ShardMessage(Message):
    """A message whose delivery info is its own.

    kombu's is part of the properties, which Celery sends to the pool's processes; what the worker keeps in it must stay
    in this process.
    """

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        super().__init__(payload, channel, **kwargs)
        self.delivery_info = dict(self.delivery_info)


def mismatch(group: str, *, actual: int, expected: int, waiting_messages: int) -> TopologyMismatch:
    return TopologyMismatch(
        f"group {group!r} has {actual} shards on the embedded broker, {expected} in the configuration, and "
        f"{waiting_messages} messages wait in them, whose keys would move; set shards={actual} until a worker has run "
        "them. Live resharding needs RabbitMQ",
        group=group,
        actual=actual,
        expected=expected,
    )


def held(group: str, *, by: str) -> LockHeld:
    return LockHeld(
        f"group {group!r} is consumed by another worker ({by}); on an embedded broker order holds with one worker "
        "only. Stop it first, leave the group out here with -X, or use RabbitMQ",
        group=group,
    )
