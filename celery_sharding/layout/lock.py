"""The locks of a group: exclusive queues, each held by a connection. Who changes a group begins with `locked_layout`.

    `shards.<group>.admin`         the topology lock: who holds it may change the layout
    `shards.<group>.dead.admin`    who holds it may take dead letters, which may take long and holds up nothing else

    free -> held    by declaring the exclusive queue, on a connection of the lock's own
    held -> lost    when that connection ends, for whatever reason; the broker frees the queue by itself
    held -> free    by leaving the `with` block, which closes the connection

The holder declares, binds and writes through that one connection, which is never opened again. So a holder that lost
the lock cannot act any more: its only way to the broker is gone. A daemon thread sends heartbeats while the holder
waits; a mutex keeps them apart from operations.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from amqp import exceptions as amqp_errors
from kombu.exceptions import OperationalError

from celery_sharding.errors import BrokerUnavailable, LockHeld, LockLost, TopologyError
from celery_sharding.layout.manifest import load_to_write
from celery_sharding.layout.model import Layout
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.connect import Connect, close_connection, open_connection
from celery_sharding.rabbitmq.refusals import explain_connecting, explained
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 10.0
_POLL_FIRST_SECONDS, _POLL_MAX_SECONDS = 0.05, 0.5


class GroupLock:
    """Hold one of a group's locks for the time of a `with` block: the topology lock, unless `queue` names another.

    Args:
        connect: Makes a kombu connection to the broker; its settings are used, the connection itself is not.
        timeout_seconds: How long to wait for another holder.
        first_node: The node of the broker to try first, by its number in the URL.
        deadline: How long to wait for all of the broker's answers together (monotonic); None: a limit for each.
        queue: The exclusive queue that is the lock; None: that of the topology lock.

    Raises:
        LockHeld: Another process held it all the time.
        BrokerUnavailable: The broker could not be reached.
        LockLost: The connection, and with it the lock, was lost; nothing more was done.
    """

    def __init__(
        self,
        connect: Connect,
        names: Names,
        *,
        timeout_seconds: float,
        first_node: int = 0,
        deadline: float | None = None,
        queue: str | None = None,
    ) -> None:
        self._connect = connect
        self._names = names
        self._timeout_seconds = timeout_seconds
        self._first_node = first_node
        self._deadline = deadline
        self._queue = queue or names.admin
        self._turn = threading.RLock()
        self._released = threading.Event()
        self._kombu_connection: Any = None  # kombu is typed in part only
        self._connection: Any = None

    def __enter__(self) -> Self:
        with reachable(self._names.group):
            configured: Any = self._connect()
            self._kombu_connection = open_connection(
                configured.clone(heartbeat=_HEARTBEAT_SECONDS), first_node=self._first_node, deadline=self._deadline
            )
            # The connection below kombu's: kombu's would open itself again, without the lock.
            self._connection = self._kombu_connection.connection
        try:
            self._acquire()
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._keep_alive, name=f"{self._queue}-heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @contextlib.contextmanager
    def operation(self) -> Iterator[Any]:
        """Yield the lock's connection for one stretch of work, free of the heartbeat thread.

        Raises:
            LockLost: The lock was lost before or during the work.
        """
        with self._turn:
            try:
                if not self._connection.connected:
                    raise amqp_errors.RecoverableConnectionError("connection closed")
                yield self._connection
            except (amqp_errors.ConnectionError, OSError) as exc:
                raise LockLost(
                    f"the lock of group {self._names.group!r} was lost with its connection ({exc}); "
                    "whoever takes it next carries on what was begun",
                    group=self._names.group,
                ) from exc

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """Yield a channel of the lock's connection, closed afterwards. Errors as for `operation`."""
        with self.operation() as connection, brief_channel(connection) as channel:
            yield channel

    def _acquire(self) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        pause = _POLL_FIRST_SECONDS
        while True:
            try:
                with self.channel() as channel, explained(self._names.group, self._queue):
                    channel.queue_declare(self._queue, durable=False, exclusive=True, auto_delete=False)
                return
            except amqp_errors.ResourceLocked as exc:
                if time.monotonic() + pause > deadline:
                    raise _lock_held(self._names.group, self._queue) from exc
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_MAX_SECONDS)

    def _keep_alive(self) -> None:
        while not self._released.wait(_HEARTBEAT_SECONDS / 4):
            with self._turn:
                if self._released.is_set() or not self._connection.connected:
                    return
                try:
                    with contextlib.suppress(socket.timeout):
                        self._connection.drain_events(timeout=0.001)
                    self._connection.heartbeat_tick()
                except (amqp_errors.AMQPError, OSError) as exc:
                    logger.warning("the lock of group %r was lost (%s)", self._names.group, exc)
                    self._connection.collect()
                    return

    def _close(self) -> None:
        self._released.set()
        with self._turn:
            if self._kombu_connection is not None:
                close_connection(self._kombu_connection)


def _lock_held(group: str, queue: str) -> LockHeld:
    return LockHeld(
        f"another process holds the lock of group {group!r} (the exclusive queue {queue!r}); try again later, or, if "
        "that process hangs, close the connection that owns the queue",
        group=group,
    )


@dataclass(frozen=True, slots=True)
class LockedLayout:
    """A group of which this process holds the topology lock: its layout, and the lock's connection, to act on."""

    connection: Any
    names: Names
    layout: Layout


@contextlib.contextmanager
def locked_layout(
    connect: Connect,
    group: str,
    *,
    timeout_seconds: float = 10.0,
    first_node: int = 0,
    allow_switch: bool = False,
    allow_undeclared: bool = False,
) -> Iterator[LockedLayout]:
    """Take a group's topology lock, read its manifest, and yield both; refuse what may not be changed now.

    Args:
        timeout_seconds: How long to wait for another holder.
        first_node: The node of the broker to try first, by its number in the URL.
        allow_switch: Also while a switch is under way.
        allow_undeclared: Also if the group was never declared.

    Raises:
        TopologyError: The group is not declared, or a switch is under way.
        ProtocolTooOld: A newer version acts on the group, and this one leaves it alone.
        LogError: The manifest could not be read.
        LockHeld, LockLost, BrokerUnavailable: As for `GroupLock`.
    """
    names = Names(group)
    with (
        GroupLock(connect, names, timeout_seconds=timeout_seconds, first_node=first_node) as lock,
        lock.operation() as connection,
    ):
        layout = load_to_write(connection, names)
        if not layout.limbo and not allow_undeclared:
            raise not_declared(group)
        if layout.switch is not None and not allow_switch:
            raise in_switch(group)
        yield LockedLayout(connection, names, layout)


def not_declared(group: str) -> TopologyError:
    return TopologyError(
        f"group {group!r} is not declared yet; run `celery shards declare {group}` or start a worker", group=group
    )


def in_switch(group: str) -> TopologyError:
    return TopologyError(
        f"group {group!r} is in the middle of a switch; run `celery shards declare {group}`, then try again",
        group=group,
    )


@contextlib.contextmanager
def reachable(group: str) -> Iterator[None]:
    """Turn a failure to connect into the error that says so."""
    try:
        yield
    except (OperationalError, amqp_errors.ConnectionError, amqp_errors.AccessRefused, OSError) as exc:
        reason = explain_connecting(exc) or f"{exc}; check the broker's URL, and that it is up"
        raise BrokerUnavailable(f"the broker of group {group!r} could not be reached: {reason}", group=group) from exc
