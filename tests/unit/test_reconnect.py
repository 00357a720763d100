"""What the library reads of Celery and kombu to reconnect sooner: a version that changes it must be noticed here."""

from __future__ import annotations

import socket
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker.consumer import Consumer
from kombu import Connection
from kombu.asynchronous import Hub

from celery_sharding.celery_hooks.connecting import WorkerConnection, connect_within_limits
from celery_sharding.testing.processes import find_free_port


def install(consumer: Any) -> WorkerConnection:
    connection = WorkerConnection(consumer)
    site = SimpleNamespace(consumer=consumer, connection=connection, watchers=[], heartbeat_seconds=15.0)
    connect_within_limits(site)  # type: ignore[arg-type]
    return connection


def test_the_first_tries_of_a_worker_come_soon_after_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a worker whose broker does not listen, and which gives up after three tries
    url = f"amqp://127.0.0.1:{find_free_port()}//"
    app = Celery("shop", broker=url, set_as_current=False)
    app.conf.update(broker_connection_max_retries=3, broker_connection_retry_on_startup=True)
    consumer = SimpleNamespace(app=app, first_connection_attempt=True, broker_connection_retry_attempt=0)
    consumer.ensure_connected = MethodType(Consumer.ensure_connected, consumer)
    waits: list[float] = []
    monkeypatch.setattr("kombu.utils.functional.sleep", waits.append)
    # When it connects
    install(consumer)
    with pytest.raises(Exception, match="Connection refused"):
        consumer.ensure_connected(Connection(url))
    # Then it has waited half a second more each time
    total = [sum(waits[:count]) for count in range(1, len(waits) + 1)]
    assert {0.5, 1.5, 3.0} <= {round(seconds, 3) for seconds in total}


def test_a_worker_that_lost_a_node_begins_with_the_next() -> None:
    # Given a worker of a broker with three nodes, which connects to the first
    nodes = [f"amqp://guest:guest@127.0.0.{number}//" for number in (1, 2, 3)]
    asked: list[str] = []

    def ensure_connected(connection: Connection) -> Connection:
        asked.append(connection.hostname)
        return connection

    consumer = SimpleNamespace(ensure_connected=ensure_connected, event_dispatcher=None)
    worker = install(consumer)
    consumer.ensure_connected(Connection(";".join(nodes)))
    # When it loses one after the other
    for _ in range(3):
        worker.leave_node()
        consumer.ensure_connected(Connection(";".join(nodes)))
    # Then it begins with the next each time
    assert asked == ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.1"]


def test_nothing_of_a_lost_connection_reaches_the_loop_of_the_next() -> None:
    # Given a connection that is read in the event loop, and lost before the loop has run; a child has its socket, too
    hub = Hub()
    ours, theirs = socket.socketpair()
    of_child = ours.dup()
    heard: list[str] = []
    hub.add_reader(ours, heard.append, "of the lost connection")
    ours.close()
    theirs.close()
    # And calls of the last turn, one of which was to read what had come
    hub.call_soon(fail_to_read)
    hub.call_soon(heard.append, "a call")
    # When the worker takes note of the loss, and its loop runs for the next connection
    install(SimpleNamespace(ensure_connected=None, hub=hub, connection_errors=(ConnectionError,))).forget_sockets()
    loop = hub.create_loop()
    for _ in range(3):
        hub.call_later(0.01, heard.append, "a timer")
        next(loop)
    # Then what was to be called was called, and nothing more is heard of the lost one
    assert heard.count("a call") == 1
    assert set(heard) == {"a call", "a timer"}
    of_child.close()
    hub.close()


def fail_to_read() -> None:
    raise ConnectionResetError
