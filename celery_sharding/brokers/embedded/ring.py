"""The exchange type `x-consistent-hash` for kombu's virtual transports.

A key goes to one of the bound queues, in the order of their names, by a hash that is the same in every process and
version. Only the name is that of RabbitMQ's ring: one queue more or less moves most keys.
"""

from __future__ import annotations

import hashlib
from typing import Any

from kombu.transport.virtual import base
from kombu.transport.virtual.exchange import ExchangeType

from celery_sharding.errors import Unroutable
from celery_sharding.topology import RING_TYPE, Names


def shard_of(key: str, shards: int) -> int:
    """Return the index of the shard that takes `key`, of `shards` ≥ 1."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % shards


class HashExchange(ExchangeType):
    """Delivers to the queue that the hash of the routing key picks; binding keys mean nothing."""

    type: Any = RING_TYPE

    def lookup(self, table: Any, exchange: str, routing_key: str, default: Any) -> list[str]:
        queues = sorted({queue for _, _, queue in table})
        return [queues[shard_of(routing_key, len(queues))]] if queues else []

    def deliver(self, message: Any, exchange: str, routing_key: str, **kwargs: Any) -> None:
        """Put the message into its queue.

        Raises:
            Unroutable: Nothing is bound. kombu's own exchanges would drop the message.
        """
        queues = self.channel._lookup(exchange, routing_key)
        if not queues:
            raise Unroutable(f"no queue is bound to the exchange {exchange!r}; nothing was stored")
        for queue in queues:
            self.channel._put(queue, message, **kwargs)


def register() -> None:
    """Make the exchange type known to the virtual channels that are opened from now on."""
    base.Channel.exchange_types.setdefault(RING_TYPE, HashExchange)


def bind_shards(channel: Any, names: Names, shards: int) -> None:
    """Declare the group's exchange in this process and bind the queues of its shards, which exist."""
    channel.exchange_declare(names.publish, RING_TYPE)
    for index in range(shards):
        channel.queue_bind(names.shard(1, index), names.publish, "1")
