"""Signs of life on a worker's connections while its main thread waits, or runs a task.

A broker that hears nothing for two heartbeats closes the connection. Before the event loop runs nobody sends any: a
worker that waited for the lock of a group would have to begin anew, and might never come to an end. And the main thread
of a solo pool runs the tasks.

    loop ──enter──▶ away: a thread sends, and notes when the broker was heard ──exit──▶ loop: it ticks and reads

The thread only sends, and only while the main thread is away, which never reads the connections then; py-amqp writes
frames under a lock of their connection. What the broker sends meanwhile waits in the socket, unread. py-amqp would take
that for silence at the next tick, so `Pulse` tells it when the broker was last heard: when more bytes came to wait, or,
once so many wait that the broker may be unable to send more, when it had received all that was sent to it.
"""

from __future__ import annotations

import fcntl
import logging
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from amqp.exceptions import AMQPError

from celery_sharding.rabbitmq.connect import cleared_is_lost

logger = logging.getLogger(__name__)

_BEATS = 4  # in one heartbeat
_IDLE_SECONDS = 1.0
_MANY_BYTES = 32_768
_T = TypeVar("_T")


class Pulse:
    """Keeps connections alive while the thread that uses them is away; that one enters and exits.

    Args:
        connections: Returns the connections of kombu, and None for one that is not there.
    """

    def __init__(self, connections: Callable[[], Iterable[Any]]) -> None:
        self._connections = connections
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
            self._inners = [inner for inner in map(_inner, self._connections()) if inner is not None]
            self._has_beaten = False
            for inner in self._inners:
                self._waiting[inner] = _unread_bytes(inner)
                if inner.prev_recv != inner.bytes_recv:
                    # Else the next tick would take what was read before for life at its own time.
                    inner.prev_recv, inner.last_heartbeat_received = inner.bytes_recv, time.monotonic()
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
            inner.last_heartbeat_received = time.monotonic()


def keep_pulse(pool: Any, pulse: AbstractContextManager[Any]) -> None:
    """Let `pool`, Celery's solo pool, run every task under `pulse`.

    `on_apply` is where a pool of Celery says how it runs a target; that the solo pool keeps a function of the module
    there, and calls the target and then the callback in it, is read of Celery 5.7.0.
    """
    stock = pool.on_apply

    def on_apply(target: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def run(*task_args: Any, **task_kwargs: Any) -> Any:
            with pulse:
                return target(*task_args, **task_kwargs)

        return stock(run, *args, **options)

    pool.on_apply = on_apply


def call_with_pulse(connection: Any, call: Callable[[], _T]) -> _T:
    """Return what `call` returns, which runs in another thread and must not use `connection`.

    Nothing is read meanwhile, so what the connection delivers comes when the event loop runs.

    Args:
        connection: Of kombu; used by this thread only.
    """
    inner = _inner(connection)
    if inner is None:
        return call()
    with ThreadPoolExecutor(1, thread_name_prefix="shards-start") as executor:
        result = executor.submit(call)
        while not wait([result], timeout=inner.heartbeat / 2).done:
            inner.send_heartbeat()
    return result.result()


def _inner(connection: Any) -> Any:
    """Return the connection of py-amqp in one of kombu; None if it is lost, or has no heartbeats."""
    inner = connection.connection if connection is not None and connection.connected else None
    return inner if getattr(inner, "heartbeat", None) and hasattr(inner, "send_heartbeat") else None


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
