"""Heartbeats on a worker's connections while its main thread waits, or runs a task.

A broker that hears nothing for two heartbeats closes the connection. Nobody sends any before the event loop runs: a
worker that waits for the lock of a group would lose its connection, begin again, and might never start. And the main
thread of a solo pool runs the tasks.

    loop ──enter──▶ away: a thread sends, and notes when the broker was heard ──exit──▶ loop: it ticks and reads

The thread only sends, and only while the main thread is away and reads nothing; py-amqp writes frames under a lock of
their connection. What the broker sends meanwhile waits in the socket. py-amqp would take that for silence at the next
tick, so `Pulse` tells it when the broker was last heard: when more bytes were waiting than before or, once so many wait
that the broker may be unable to send more, when TCP had acknowledged all that was sent to it.
"""

from __future__ import annotations

import fcntl
import logging
import struct
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

from amqp.exceptions import AMQPError

from celery_sharding.celery_hooks.connecting import WorkerConnection
from celery_sharding.celery_hooks.heartbeats import note_heard, note_read, open_amqp_connection
from celery_sharding.rabbitmq.connect import cleared_is_lost

logger = logging.getLogger(__name__)

_BEATS = 4  # in one heartbeat
_IDLE_SECONDS = 1.0
_MANY_BYTES = 32_768


class Preparing(Protocol):
    """What takes long before the event loop runs."""

    def prepare(self) -> None:
        """Do it, using no connection of the calling thread."""


class Pulse:
    """Keeps a worker's connections alive while its main thread is away, which enters and exits."""

    def __init__(self, connection: WorkerConnection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._depth = 0
        self._inners: list[Any] = []
        self._has_beaten = False
        self._waiting: dict[Any, int] = {}  # bytes that were unread at the last look, by connection of py-amqp
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            inners = map(open_amqp_connection, self._connection.beating())
            self._inners = [inner for inner in inners if inner is not None]
            self._has_beaten = False
            for inner in self._inners:
                self._waiting[inner] = _unread_bytes(inner)
                note_read(inner)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shards-pulse", daemon=True)
                self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            for inner in self._inners if self._has_beaten else ():
                self._listen(inner)
            self._waiting.clear()

    def _run(self) -> None:
        while True:
            time.sleep(min([inner.heartbeat / _BEATS for inner in self._inners], default=_IDLE_SECONDS))
            with self._lock:
                if self._depth:
                    self._has_beaten = True
                    for inner in self._inners:
                        self._beat(inner)

    def _beat(self, inner: Any) -> None:
        try:
            with cleared_is_lost():
                self._listen(inner)
                inner.send_heartbeat()
        except (OSError, AMQPError) as exc:
            logger.debug("no sign of life could be sent: %r", exc)  # the main thread finds the loss when it comes back

    def _listen(self, inner: Any) -> None:
        """Note whether the broker was heard since the last look."""
        waiting, before = _unread_bytes(inner), self._waiting.get(inner, 0)
        self._waiting[inner] = waiting
        if waiting > before or (waiting > _MANY_BYTES and _unacknowledged_bytes(inner) == 0):
            note_heard(inner)


def prepare_with_pulse(connection: Any, preparing: Preparing) -> None:
    """Prepare in another thread, and send signs of life on `connection` meanwhile.

    Nothing is read meanwhile, so what the connection delivers comes when the event loop runs.

    Args:
        connection: Of kombu; used by this thread only.
    """
    inner = open_amqp_connection(connection)
    if inner is None:
        preparing.prepare()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="shards-start") as executor:
        result = executor.submit(preparing.prepare)
        while not wait([result], timeout=inner.heartbeat / 2).done:
            inner.send_heartbeat()
    result.result()


def _unread_bytes(inner: Any) -> int:
    return _queued_bytes(inner, termios.FIONREAD)


def _unacknowledged_bytes(inner: Any) -> int:
    return _queued_bytes(inner, termios.TIOCOUTQ)


def _queued_bytes(inner: Any, queue: int) -> int:
    """Return how many bytes the kernel holds of a connection: unread, or sent and not acknowledged by TCP."""
    try:
        with cleared_is_lost():
            if not inner.connected:
                return 0  # py-amqp would connect again, to have a socket
            (count,) = struct.unpack("i", fcntl.ioctl(inner.sock.fileno(), queue, bytes(4)))
    except (OSError, ValueError, AMQPError):
        return 0  # it is gone
    return int(count)
