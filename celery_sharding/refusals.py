"""The broker's refusals, as errors that name the fix.

What a broker answers to a declaration, a binding or a look differs from version to version; this is the one place that
reads its codes and texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from amqp import exceptions as amqp_errors

from celery_sharding.errors import OutOfReach, PluginMissing, ShardingError, TopologyError, TopologyMismatch


@contextlib.contextmanager
def explained(group: str, entity: str) -> Iterator[None]:
    """Turn the broker's refusal to declare or bind `entity` into the error that names the fix."""
    try:
        yield
    except (amqp_errors.AMQPError, amqp_errors.MessageNacked) as exc:
        error = explain(exc, group, entity)
        if error is None:
            raise
        raise error from exc


def explain(exc: Exception, group: str, entity: str) -> ShardingError | None:
    """Return the library's error for a broker's refusal about `entity`; None if it is no such refusal."""
    code, text = getattr(exc, "reply_code", None), str(getattr(exc, "reply_text", ""))
    if is_out_of_reach(exc):
        return out_of_reach(entity, group=group)
    if "unknown exchange type" in text:  # 503 and a closed connection on 3.x, 406 on 4.x
        return PluginMissing(
            f"group {group!r} needs the exchange type 'x-consistent-hash', which the broker does not know; "
            "run `rabbitmq-plugins enable rabbitmq_consistent_hash_exchange` on every node",
            group=group,
        )
    if code == amqp_errors.PreconditionFailed.code:
        return TopologyMismatch(
            f"group {group!r}: {entity!r} exists on the broker with other arguments ({text}); give the group the "
            "options it was made with (queue_type), choose another name for it, or, if it is not needed any more, "
            f"delete the queues and exchanges that begin with shards.{group}",
            group=group,
            entity=entity,
        )
    if code == amqp_errors.AccessRefused.code:
        return TopologyError(
            f"group {group!r}: the broker's user may not touch {entity!r} ({text}); grant it configure, write and "
            rf"read on the pattern ^shards\.{group}(\.|$), and write and read on amq.default",
            group=group,
            entity=entity,
        )
    if code == amqp_errors.NotFound.code:
        return TopologyError(
            f"group {group!r}: something that {entity!r} needs is gone ({text}); it was deleted by someone else, "
            "the next look of a worker puts it right",
            group=group,
            entity=entity,
        )
    return None


def is_out_of_reach(exc: Exception) -> bool:
    """Tell whether the broker refused a queue whose node is down or not ready yet, which is not gone.

    It answers 404 as for a queue that does not exist, with another text. Until then messages to it are returned. Of a
    stream, a node that has just come back says 406 until its replica follows.
    """
    text = str(getattr(exc, "reply_text", ""))
    return "down or inaccessible" in text or "does not have a replica on the local node" in text


def out_of_reach(queue: str, **facts: str) -> OutOfReach:
    """Return the error for a queue that `is_out_of_reach`."""
    return OutOfReach(
        f"the broker's node that has {queue!r} is down or still starting; wait, or start it. A node that joined the "
        "cluster later has no replica of a stream until `rabbitmq-streams add_replica` gives it one",
        **facts,
    )
