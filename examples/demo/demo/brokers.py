"""Which broker the demo runs on, and how everything it put there is removed.

In this order: `BROKER_URL`; a private RabbitMQ, installed first if it is missing and this user may; an embedded broker
on SQLite.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from amqp.exceptions import AMQPError
from kombu import Connection

from celery_sharding.layout.cleanup import delete_group
from celery_sharding.testing import RabbitNode, ServerMissing

INSTALLER = Path(__file__).resolve().parents[3] / "scripts" / "install_servers"
# What any Celery worker declares and nobody removes.
_CELERY_EXCHANGES = ("celeryev", "celery.pidbox", "reply.celery.pidbox")


class BadBroker(ValueError):
    """`BROKER_URL` cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker to run on. An embedded one has one worker and no kill."""

    url: str
    title: str
    is_embedded: bool = False


@contextmanager
def open_broker(folder: Path, *, name: str, say: Callable[[str], None]) -> Iterator[Broker]:
    """Offer a broker, and remove from it what the run called `name` made.

    Raises:
        BadBroker: `BROKER_URL` is no RabbitMQ, or does not answer.
    """
    url = os.environ.get("BROKER_URL")
    if url:
        with _open_given(url, name) as broker:
            yield broker
        return
    try:
        node = _start_private(say)
    except ServerMissing as error:
        say(f"[yellow]{error}[/]")
        say("[yellow]running on an embedded broker: one worker, stopped warm and not killed[/]")
        yield Broker(f"sqla+sqlite:///{folder / 'broker.db'}", "embedded broker (SQLite)", is_embedded=True)
        return
    with node:
        yield Broker(node.url, f"a private RabbitMQ {node.ctl('-q', 'version').strip()}")


def _start_private(say: Callable[[str], None]) -> RabbitNode:
    node = RabbitNode()
    try:
        say("starting a private RabbitMQ")
        node.start()
    except ServerMissing:
        try:
            subprocess.run([INSTALLER, "rabbitmq-server"], check=True)
            node.start()
        except subprocess.CalledProcessError as error:
            node.remove()
            raise ServerMissing("there is no RabbitMQ, and it could not be installed") from error
        except BaseException:
            node.remove()
            raise
    except BaseException:
        node.remove()
        raise
    return node


@contextmanager
def _open_given(url: str, name: str) -> Iterator[Broker]:
    connection = Connection(url, connect_timeout=10)
    if connection.transport.driver_type != "amqp":
        raise BadBroker(f"BROKER_URL is {connection.as_uri()}; the demo needs a RabbitMQ (amqp://…)")
    try:
        connection.connect()
    except (OSError, AMQPError) as error:
        raise BadBroker(f"BROKER_URL does not answer: {connection.as_uri()}: {error}") from error
    version = connection.connection.server_properties.get("version", "")
    missing = [exchange for exchange in _CELERY_EXCHANGES if not _exists(connection, exchange)]
    connection.close()
    try:
        yield Broker(url, f"RabbitMQ {version} at {connection.as_uri()}")
    finally:
        with Connection(url) as connection:
            delete_group(connection, name)
            with connection.channel() as channel:
                channel.queue_delete(f"{name}-stock")
                channel.exchange_delete(f"{name}-stock")
            for exchange in missing:
                # In use or not there: then it is not ours to remove.
                with suppress(AMQPError), connection.channel() as channel:
                    channel.exchange_delete(exchange, if_unused=True)


def _exists(connection: Connection, exchange: str) -> bool:
    try:
        with connection.channel() as channel:
            channel.exchange_declare(exchange, "direct", passive=True)
    except AMQPError:
        return False
    return True
