"""A group with workers and a publisher, for the broker tests."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import sqlalchemy
from amqp import Message
from celery import Celery
from celery.result import AsyncResult
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.dedup import claim_metadata
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.status import GroupStatus
from celery_sharding.testing import Trace, Verdict, WorkerNode, check_order
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from celery_sharding.worker.run.ack_batch import WAIT_SECONDS
from support.paths import APPS, python_path


class Shop:
    """A group, its workers, and a publisher in this process; its workers are killed on exit."""

    def __init__(self, group: str, broker_url: str, folder: Path, *, app: str = "shop", backend: str | None = None):
        self.module = app
        self.group = group
        self.names = Names(group)
        self.trace = Trace(folder / "trace")
        self.folder = folder
        self.broker_url = broker_url
        (folder / "results").mkdir()
        self.env = {
            "SHOP_GROUP": group,
            "SHOP_BROKER": broker_url,
            "SHOP_BACKEND": backend or f"file://{folder}/results",
            "SHOP_LEDGER": f"sqlite:///{folder}/ledger.db",
            "SHOP_TRACE": str(self.trace.path),
            "PYTHONPATH": python_path(APPS),
        }
        self.app = Celery("publisher", broker=broker_url, backend=self.env["SHOP_BACKEND"], set_as_current=False)
        self.app.conf.sharding_routes = {f"{app}.*": {"group": group, "key": "key"}}
        Sharding(self.app, groups=[ShardGroup(group, shards=4)])
        self.workers: list[WorkerNode] = []
        self.published: list[tuple[str, int]] = []

    def send(self, task: str, key: str, number: int, **kwargs: object) -> AsyncResult:
        options = {name: kwargs.pop(name) for name in ("task_id", "expires") if name in kwargs}
        self.published.append((key, number))
        return self.app.send_task(f"{self.module}.{task}", kwargs={"key": key, "number": number, **kwargs}, **options)

    @contextlib.contextmanager
    def occupied(self) -> Iterator[None]:
        """Keep one process, or thread, of a worker busy with an ordinary task in the `with` block."""
        until = self.folder / f"free-{uuid.uuid4().hex}"
        self.app.send_task("plain.occupy", args=[str(until)], queue=f"{self.group}-plain")
        try:
            assert self.trace.wait_for(1, kind="occupied")
            yield
        finally:
            until.touch()

    def worker(self, *arguments: str, wait_seconds: float = 40.0, **env: str) -> WorkerNode:
        node = WorkerNode(
            self.module,
            f"w{len(self.workers)}-{uuid.uuid4().hex[:6]}@test",
            arguments or ("-c", "4"),
            env={**self.env, **env},
            folder=self.folder,
        )
        self.workers.append(node)
        return node.start(wait_seconds=wait_seconds)

    def make_ledger(self) -> None:
        """Make the tables that payments are written to; many tasks that did so at once would hinder each other."""
        engine = sqlalchemy.create_engine(self.env["SHOP_LEDGER"])
        claim_metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE ledger (event TEXT, number INTEGER)"))
        engine.dispose()

    def paid(self) -> list[int]:
        """Return the numbers of the payments that are in the ledger, in their order.

        What ended is no measure: a process that is killed after its commit leaves no mark, and its message is done.
        """
        with contextlib.closing(sqlite3.connect(self.folder / "ledger.db", timeout=30)) as ledger:
            return [number for (number,) in ledger.execute("SELECT number FROM ledger ORDER BY rowid")]

    def verdict(self) -> Verdict:
        return check_order(self.trace, self.published)

    def just_ended(self, at: float) -> int:
        """Return how many runs ended so shortly before `at` that a busy worker may not have acknowledged them.

        Twice what it gathers at most: marks are older than acknowledgements.
        """
        return sum(at - 2 * WAIT_SECONDS < mark.at < at for mark in self.trace.read() if mark.kind == "end")

    def dead_letters(self, count: int) -> list[Message]:
        """Take `count` dead letters out of their queue."""
        found: list[Message] = []

        def take() -> bool:
            with Connection(self.broker_url) as connection:
                channel = connection.channel()
                while (message := channel.basic_get(self.names.dead, no_ack=True)) is not None:
                    found.append(message)
            return len(found) >= count

        assert wait_until(take, timeout_seconds=30), f"{len(found)} dead letters, not {count}"
        return found

    def status(self) -> GroupStatus:
        with Connection(self.broker_url) as connection:
            return read_snapshot(connection, [self.group]).groups[0]

    def has_nothing_left(self) -> bool:
        """Say whether no message waits or is held, as the status shows it."""
        return all(row.ready == 0 and row.held == 0 for row in self.status().rows)

    def owners(self) -> list[str | None]:
        """Return the owner of each live shard, as the status shows it."""
        return [row.owner for row in self.status().rows]

    def is_store_away_for(self, seconds: float) -> bool:
        """Say whether messages wait for the claim store, which has not answered for so long, as the status shows it."""
        since = self.status().store_away_since
        return since is not None and time.time() - since >= seconds

    def kill_workers(self) -> None:
        for worker in self.workers:
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_workers()
