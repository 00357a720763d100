"""Which queues exist, and how many messages and consumers they have, by passive declarations.

Many queues are asked about at once, so a look at hundreds of shards costs a few round trips. Counts are hints: brokers
count quorum queues late, and streams wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from amqp import exceptions as amqp_errors
from amqp import spec

from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.pipelining import Look, all_exist, exist_at_once
from celery_sharding.rabbitmq.refusals import explained, is_out_of_reach

_AT_ONCE = 100


def queue_exists(connection: Opener, queue: str) -> bool:
    """Say whether `queue` exists, even if it is out of reach at the moment."""
    return all_exist(connection, Look(queue))


def existing_queues(connection: Opener, queues: Sequence[str]) -> list[str]:
    """Return which of `queues` exist, even if they are out of reach at the moment."""
    answers = exist_at_once(connection, [Look(queue) for queue in queues])
    return [
        queue for queue, refusal in zip(queues, answers, strict=True) if refusal is None or is_out_of_reach(refusal)
    ]


def count_ready(connection: Opener, queue: str) -> int | None:
    """Return the number of waiting messages, without those that a consumer holds; None if there is no such queue."""
    with brief_channel(connection) as channel:
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except amqp_errors.NotFound as exc:
            return 0 if is_out_of_reach(exc) else None


def count_consumers(connection: Opener, queue: str) -> int:
    """Return how many consumers `queue` has, standbys included; 0 if there is no such queue."""
    with brief_channel(connection) as channel:
        try:
            return int(channel.queue_declare(queue, passive=True).consumer_count)
        except amqp_errors.NotFound:
            return 0


def count_queues(connection: Opener, group: str, queues: Iterable[str]) -> tuple[dict[str, int | None], dict[str, int]]:
    """Return each queue's waiting messages (None: it is gone, or out of reach), and its consumers.

    Raises:
        TopologyError: The broker's user may not see a queue.
        OSError, amqp's ConnectionError: The connection was lost.
    """
    ready: dict[str, int | None] = {}
    consumers: dict[str, int] = {}
    left, size = list(queues), _AT_ONCE
    with brief_channel(connection) as channel:
        while left:
            for queue in left[:size]:
                _ask(channel, queue)
            counted = _take_answers(channel, group, left[:size], ready, consumers)
            # At a queue that is missing the broker closes the channel and forgets what was asked behind it.
            size = 1 if counted < size else min(2 * size, _AT_ONCE)
            left = left[counted:]
    return ready, consumers


def _ask(channel: Any, queue: str) -> None:
    """Send what `channel.queue_declare(queue, passive=True)` sends, without waiting for the answer."""
    passive, durable, exclusive, auto_delete, nowait = True, False, False, False, False
    arguments = (0, queue, passive, durable, exclusive, auto_delete, nowait, None)
    channel.send_method(spec.Queue.Declare, "BsbbbbbF", arguments)


def _take_answers(
    channel: Any, group: str, queues: Sequence[str], ready: dict[str, int | None], consumers: dict[str, int]
) -> int:
    """Take the answers for `queues` up to the first that is missing; return how many queues were answered for."""
    for number, queue in enumerate(queues, start=1):
        with explained(group, queue):
            try:
                _, messages, consuming = channel.wait(spec.Queue.DeclareOk, returns_tuple=True)
            except amqp_errors.NotFound:
                # py-amqp has opened the channel again before it raised this.
                ready[queue] = None
                return number
        ready[queue], consumers[queue] = int(messages), int(consuming)
    return len(queues)
