"""What exists of a group on the broker, whatever its manifest says, and what waits in a queue.

A quorum queue's message count is late and includes markers and probes. So tasks are found by consuming the queue up to
a marker of one's own. That needs a queue without other consumers, since only one of them gets messages.
"""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections import deque
from collections.abc import Generator
from typing import Any

import amqp

from celery_sharding import topology
from celery_sharding.celery_hooks.foreign import read_foreign
from celery_sharding.errors import LogError
from celery_sharding.layout.model import Layout
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.queues import queue_exists
from celery_sharding.rabbitmq.streams import publish_confirmed
from celery_sharding.topology import Names
from celery_sharding.wire import PROBE, control_headers, control_of

# How far beyond the manifest to look for queues.
BEYOND = 3
_STEP_SECONDS = 30.0
_PREFETCH = 100


def existing_queues(connection: Opener, names: Names, layout: Layout) -> list[str]:
    """Return the limbo and shard queues that exist on the broker, even if the manifest does not know them."""
    limbos = [names.limbo(number) for number in range(1, layout.limbo + BEYOND + 1)]
    found = [queue for queue in limbos if queue_exists(connection, queue)]
    shards = max([layout.shards, *(segment.shards for segment in layout.segments)])
    for generation in range(1, layout.generation + BEYOND + 1):
        known = layout.segment(f"g{generation:03d}")
        count = known.shards if known is not None else shards
        missing = set(topology.missing_shards(connection, names, generation, count))
        found += [names.shard(generation, index) for index in range(count) if index not in missing]
        index = count
        while queue_exists(connection, names.shard(generation, index)):
            found.append(names.shard(generation, index))
            index += 1
    return found


def group_exists(connection: Opener, names: Names) -> bool:
    """Tell whether the broker knows anything of the group."""
    logs = (names.manifest, names.journal, names.attempts, names.dead)
    return (
        topology.fixed_exists(connection, names)
        or any(queue_exists(connection, queue) for queue in logs)
        or bool(existing_queues(connection, names, Layout()))
    )


def waiting_tasks(connection: Any, queue: str) -> Generator[tuple[Any, amqp.Message]]:
    """Yield what waits in a queue that nobody else consumes, with the channel to acknowledge it on.

    What is not acknowledged is requeued, in order, when the iterator is closed; so are end markers and seals.

    Raises:
        LogError: The end of the queue was not reached in time; somebody else may consume it.
    """
    nonce = uuid.uuid4().hex
    arrived: deque[amqp.Message] = deque()
    with brief_channel(connection) as source:
        with brief_channel(connection) as target:
            marker = amqp.Message(b"", delivery_mode=2, application_headers=control_headers(PROBE, nonce=nonce))
            publish_confirmed(target, marker, queue, timeout_seconds=_STEP_SECONDS)
        read_foreign(source)
        source.basic_qos(0, _PREFETCH, False)
        source.basic_consume(queue, callback=arrived.append)
        deadline = time.monotonic() + _STEP_SECONDS
        while True:
            while arrived:
                message = arrived.popleft()
                headers = message.headers or {}
                control = control_of(headers)
                if control is None:
                    yield source, message
                    deadline = time.monotonic() + _STEP_SECONDS
                elif control == PROBE:
                    source.basic_ack(message.delivery_tag)
                    if headers.get("nonce") == nonce:
                        source.basic_qos(0, _PREFETCH, False)  # answered when all acknowledgements are taken
                        return
            with contextlib.suppress(socket.timeout):
                connection.drain_events(timeout=max(0.001, deadline - time.monotonic()))
            if not arrived and time.monotonic() > deadline:
                raise LogError(f"{queue!r} could not be read to its end; does somebody consume it?", stream=queue)


def holds_tasks(connection: Any, queue: str) -> bool:
    """Tell whether tasks wait in a queue that nobody consumes."""
    with contextlib.closing(waiting_tasks(connection, queue)) as tasks:
        return next(tasks, None) is not None
