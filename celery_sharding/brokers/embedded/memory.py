"""Groups on kombu's `memory://`: queues of this process, for all apps and threads in it.

    waiting ──_get──▶ held by its channel ──basic_ack──▶ gone
       ▲                    │
       └──── close ─────────┘   back at the head, in the order of delivery

Only the thread that consumes calls `_get` and `close`; acknowledgements come from any.
"""

from __future__ import annotations

import threading
from typing import Any

from kombu.transport import memory

from celery_sharding.brokers.embedded.broker import ShardMessage, held, mismatch
from celery_sharding.brokers.embedded.ring import bind_shards
from celery_sharding.errors import BrokerUnavailable
from celery_sharding.topology import Names

# kombu's queues and bindings are global to the process, so are these.
_ARRANGING = threading.RLock()
_owners: dict[str, str] = {}


class MemoryShardChannel(memory.Channel):
    """Reads shard queues; a close gives back what was not acknowledged."""

    Message = ShardMessage

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._held: dict[str, tuple[str, dict[str, Any]]] = {}

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        super().basic_ack(delivery_tag, multiple)
        self._held.pop(delivery_tag, None)

    def close(self) -> None:
        if not self.closed:
            for tag in reversed(list(self._held)):
                # Another thread may acknowledge it at this moment.
                if (item := self._held.pop(tag, None)) is None:
                    continue
                queue, message = item
                waiting = self._queue_for(queue)
                with waiting.mutex:
                    waiting.queue.appendleft(message)
                    waiting.unfinished_tasks += 1
                    waiting.not_empty.notify()
        super().close()

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        message: dict[str, Any] = super()._get(queue, timeout)
        self._held[message["properties"]["delivery_tag"]] = queue, message
        # The worker writes into what it is given; what goes back must be as it came.
        return {**message, "headers": dict(message["headers"]), "properties": dict(message["properties"])}


class MemoryBroker:
    """The memory broker of this process."""

    errors: tuple[type[Exception], ...] = ()
    channel_class = MemoryShardChannel

    def __init__(self) -> None:
        self._locked: set[str] = set()

    def arrange(self, channel: Any, names: Names, shards: int) -> None:
        wanted = {names.shard(1, index) for index in range(shards)}
        with _ARRANGING:
            exchange = channel.state.exchanges.get(names.publish)
            bound = {queue for _, _, queue in exchange["table"]} if exchange else set()
            if bound and bound != wanted:
                if names.group in _owners:
                    raise held(names.group, by=_owners[names.group])
                waiting = sum(channel._size(queue) for queue in bound)
                if waiting:
                    raise mismatch(names.group, actual=len(bound), expected=shards, waiting_messages=waiting)
                for queue in bound - wanted:
                    channel.queue_unbind(queue, names.publish, "1")
            for queue in wanted:
                channel.queue_declare(queue)
            # Under the lock, because another thread must not publish to half of the bindings.
            bind_shards(channel, names, shards)

    def lock(self, group: str, *, owner: str) -> None:
        with _ARRANGING:
            if _owners.setdefault(group, owner) != owner:
                raise held(group, by=_owners[group])
            self._locked.add(group)

    def unlock_all(self) -> None:
        with _ARRANGING:
            for group in self._locked:
                _owners.pop(group, None)
            self._locked.clear()

    def after_fork(self) -> None:
        raise BrokerUnavailable(
            "memory:// lives in one process, and this one was forked from it: what it publishes would reach nobody. "
            "Run the worker with --pool threads or solo, or use sqla+sqlite:///FILE or RabbitMQ"
        )
