"""The broker's refusals, as errors that name the fix.

A broker's answers to a connection, a declaration, a look or a message differ from version to version. Only this module
reads their codes and texts.
"""

from __future__ import annotations

import contextlib
import ssl
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
            f"group {group!r}: something that {entity!r} needs is gone ({text}); someone deleted it, and a "
            "worker repairs it within seconds",
            group=group,
            entity=entity,
        )
    return None


def explain_connecting(exc: BaseException) -> str | None:
    """Return why the broker refuses a client's connection, with the fix; None if trying again may help."""
    text = str(getattr(exc, "reply_text", None) or exc)
    if isinstance(exc, amqp_errors.AccessRefused):
        return f"the broker refuses the login ({text}); correct the user and the password in broker_url"
    if isinstance(exc, amqp_errors.NotAllowed):
        if "limit" in text:  # on the connections of a user or virtual host: there may be room again
            return None
        if "not found" in text:
            fix = "correct the virtual host in broker_url, or make it: `rabbitmqctl add_vhost NAME`"
        else:
            fix = "give the user rights on the virtual host: `rabbitmqctl set_permissions -p VHOST USER …`"
        return f"the broker refuses the connection ({text}); {fix}"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return (
            f"the broker's certificate is not trusted ({exc.verify_message}); set the authority that signed it, "
            "ca_certs, in broker_use_ssl, and connect by the name that the certificate is for"
        )
    # A connection that is lost in the middle of the handshake ends with one of these two.
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        if exc.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            fix = "there is no TLS on this port: name that of TLS (5671 by default), or remove broker_use_ssl"
        else:
            fix = "check broker_use_ssl: the client's certificate and key, and the versions of TLS"
        return f"TLS with the broker failed ({exc}); {fix}"
    return None


def explain_publish(exc: BaseException | None, exchange: str) -> str:
    """Return why the broker has refused a message, with the fix where one is known."""
    if isinstance(exc, amqp_errors.AccessRefused):
        pattern = exchange.replace(".", r"\.")
        return f"{exc.reply_text}; grant the broker's user write on the pattern ^{pattern}(\\.|$)"
    if isinstance(exc, amqp_errors.PreconditionFailed) and "size" in str(exc.reply_text):
        return f"{exc.reply_text}; put what is large elsewhere, or raise max_message_size in the broker's configuration"
    return str(getattr(exc, "reply_text", None) or exc)


def is_out_of_reach(exc: Exception) -> bool:
    """Say whether the broker refused a queue that is not gone: its node is down, or not ready yet.

    It answers 404 as for a queue that does not exist, with another text, and returns messages to it. A node that has
    just come back answers 406 for a stream until its replica follows.
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
