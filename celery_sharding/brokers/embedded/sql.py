"""Groups on kombu's `sqla+sqlite:///FILE`: messages are rows of its tables, read by a channel of ours.

    visible ──_get──▶ invisible: held by the worker ──basic_ack──▶ row deleted
       ▲                          │
       ├───────── close ──────────┤
       └── the next worker starts ┘   after a kill; marked as redelivered

A row keeps its id, and rows are read in the order of their ids, so what comes back keeps its place. SQLite has one
writer at a time and never reuses an id, so that is also the order of the commits.

One worker per group holds a lock on the file `FILE.shards.GROUP.lock`, which the system releases with the process.
Other databases are refused: their ids need not follow the order of commits.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections import deque
from pathlib import Path
from queue import Empty
from typing import IO, Any

import sqlalchemy as sa
from kombu import Connection
from kombu.transport import sqlalchemy as kombu_sql
from sqlalchemy.exc import DBAPIError

from celery_sharding.brokers.embedded.broker import ShardMessage, held, mismatch
from celery_sharding.brokers.embedded.gate import gate
from celery_sharding.brokers.embedded.ring import bind_shards
from celery_sharding.errors import LockHeld, UnsupportedBroker
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)

_LOCK_WAIT_SECONDS = 2.0
_BATCH = 500


class SqlChannel(kombu_sql.Channel):
    """kombu's own, inside the gate wherever it reads or writes."""

    def _open(self) -> Any:
        with gate:
            return super()._open()

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        with gate:
            super()._new_queue(queue, **kwargs)

    def _put(self, queue: str, *args: Any, **kwargs: Any) -> None:
        with gate:
            super()._put(queue, *args, **kwargs)

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        with gate:
            return super()._get(queue)

    def _size(self, queue: str) -> Any:
        with gate:
            return super()._size(queue)

    def _purge(self, queue: str) -> Any:
        with gate:
            return super()._purge(queue)


class SqlShardChannel(SqlChannel):
    """Reads shard queues; only under the lock of their group."""

    Message = ShardMessage
    do_restore = False  # kombu would put back what was not acknowledged behind the rest, last one first

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._queue_ids: dict[str, int] = {}
        self._held: dict[str, int] = {}
        self._redelivered: set[int] = set()
        self._settled: deque[int] = deque()
        self._engine: sa.Engine = self._open()[0]

    def basic_consume(self, queue: str, *args: Any, **kwargs: Any) -> None:
        """Consume `queue`, from what a killed worker held on."""
        messages, queues = self.message_cls.__table__, self.queue_cls.__table__
        with gate, self._engine.begin() as database:
            found = database.execute(sa.select(queues.c.id).where(queues.c.name == queue)).scalar_one()
            left = messages.c.queue_id == found, messages.c.visible.is_(False)
            self._redelivered.update(database.execute(sa.select(messages.c.id).where(*left)).scalars())
            if self._redelivered:
                database.execute(sa.update(messages).where(*left).values(visible=True))
        self._queue_ids[queue] = found
        super().basic_consume(queue, *args, **kwargs)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        super().basic_ack(delivery_tag, multiple)
        row = self._held.pop(delivery_tag, None)
        if row is not None:
            self._settled.append(row)
            self._delete_settled()

    def close(self) -> None:
        if not self.closed:
            self._delete_settled()
            messages = self.message_cls.__table__
            rows = list(self._held.values())
            try:
                with gate, self._engine.begin() as database:
                    for start in range(0, len(rows), _BATCH):
                        batch = messages.c.id.in_(rows[start : start + _BATCH])
                        database.execute(sa.update(messages).where(batch).values(visible=True))
            except DBAPIError as exc:
                logger.warning("the next worker finds what was held here as redelivered: %s", exc)
            self._held.clear()
        super().close()

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        messages = self.message_cls.__table__
        self._delete_settled()
        try:
            with gate, self._engine.begin() as database:
                row = database.execute(
                    sa.select(messages.c.id, messages.c.payload)
                    .where(messages.c.queue_id == self._queue_ids[queue], messages.c.visible.is_(True))
                    .order_by(messages.c.id)
                    .limit(1)
                ).first()
                if row is not None:
                    database.execute(sa.update(messages).where(messages.c.id == row.id).values(visible=False))
        except DBAPIError as exc:
            logger.warning("%s could not be read, trying again: %s", queue, exc)
            raise Empty from exc
        if row is None:
            raise Empty
        message: dict[str, Any] = json.loads(row.payload)
        self._held[message["properties"]["delivery_tag"]] = row.id
        if row.id in self._redelivered:
            self._redelivered.discard(row.id)
            message["properties"]["delivery_info"]["redelivered"] = True
        return message

    def _delete_settled(self) -> None:
        """Delete the rows of acknowledged messages; a failure is tried again with the next message."""
        if not self._settled:
            return
        messages = self.message_cls.__table__
        with gate:
            rows = list(self._settled)
            try:
                with self._engine.begin() as database:
                    for start in range(0, len(rows), _BATCH):
                        batch = messages.c.id.in_(rows[start : start + _BATCH])
                        database.execute(sa.delete(messages).where(batch))
            except DBAPIError as exc:
                logger.warning("%d messages are done but not deleted yet: %s", len(rows), exc)
                return
            for _ in rows:
                self._settled.popleft()


class SqlBroker:
    """One SQLite file."""

    errors: tuple[type[Exception], ...] = (DBAPIError,)
    channel_class = SqlShardChannel

    def __init__(self, connection: Connection) -> None:
        """Raise `UnsupportedBroker` unless the connection leads to a SQLite file."""
        url = sa.make_url(connection.hostname or "")
        if url.get_backend_name() != "sqlite":
            raise UnsupportedBroker(
                f"shard groups run on sqla+sqlite:///FILE, not on {url.get_backend_name()}, whose rows need not be "
                "read in the order in which they were committed; use RabbitMQ"
            )
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise UnsupportedBroker(
                "shard groups on sqla+sqlite need the path of a file, sqla+sqlite:///FILE, that worker and publishers "
                "share; within one process memory:// serves"
            )
        # The worker reads its ordinary queues from the same file; they must not be in the middle of it either.
        kombu_sql.Transport.Channel = SqlChannel
        self._file = Path(url.database).absolute()
        self._locks: dict[str, tuple[str, IO[str]]] = {}

    def arrange(self, channel: Any, names: Names, shards: int) -> None:
        wanted = {names.shard(1, index) for index in range(shards)}
        queues = channel.queue_cls.__table__
        pattern = names.ring(1).replace("_", r"\_") + ".%"
        with channel._open()[0].connect() as database:
            # All queues change in one transaction, so that nobody sees or publishes to half of them.
            database.exec_driver_sql("BEGIN IMMEDIATE")
            found = database.execute(
                sa.select(queues.c.name, queues.c.id).where(queues.c.name.like(pattern, escape="\\"))
            )
            existing: dict[str, int] = {row.name: row.id for row in found}
            if existing and set(existing) != wanted:
                self._check_change(database, channel, names, existing, shards)
                surplus = [number for name, number in existing.items() if name not in wanted]
                database.execute(sa.delete(queues).where(queues.c.id.in_(surplus)))
            missing = sorted(wanted - set(existing))
            if missing:
                database.execute(sa.insert(queues), [{"name": name} for name in missing])
            database.commit()
        bind_shards(channel, names, shards)

    def lock(self, group: str, *, owner: str) -> None:
        known = self._locks.get(group)
        if known is not None:
            if known[0] != owner:
                raise held(group, by=known[0])
            return
        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            # The children of a worker that was killed hold its lock for another moment.
            try:
                self._locks[group] = owner, self._take_lock(group, f"{owner}, process {os.getpid()}")
                return
            except LockHeld:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def unlock_all(self) -> None:
        while self._locks:
            _release(self._locks.popitem()[1][1])

    def after_fork(self) -> None:
        # SQLite connections must not be used in a forked child; kombu keeps one engine a URL for the whole process.
        inherited = dict(kombu_sql.Channel._engines)
        kombu_sql.Channel._engines.clear()
        for engine, _ in inherited.values():
            engine.dispose(close=False)

    def _check_change(self, database: Any, channel: Any, names: Names, existing: dict[str, int], shards: int) -> None:
        """Raise unless nobody consumes the queues and nothing waits in them."""
        messages = channel.message_cls.__table__
        known = self._locks.get(names.group)
        if known is not None:
            raise held(names.group, by=known[0])
        lock = self._take_lock(names.group, f"process {os.getpid()}")
        try:
            waiting = database.execute(
                sa.select(sa.func.count()).where(messages.c.queue_id.in_(list(existing.values())))
            ).scalar_one()
        finally:
            _release(lock)
        if waiting:
            raise mismatch(names.group, actual=len(existing), expected=shards, waiting_messages=waiting)

    def _take_lock(self, group: str, holder: str) -> IO[str]:
        file = Path(f"{self._file}.shards.{group}.lock").open("a+")  # noqa: SIM115  # open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.seek(0)
            by = file.read().strip() or "unknown"
            file.close()
            raise held(group, by=by) from exc
        file.truncate(0)
        file.write(holder)
        file.flush()
        return file


def _release(file: IO[str]) -> None:
    # Closing alone would leave the lock with children that were forked meanwhile.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()
