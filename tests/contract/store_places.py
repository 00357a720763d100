"""The stores under test, each with a way to let time pass for one record, and to damage it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import redis
import sqlalchemy
from celery import Celery

from celery_sharding.dedup.claims import Store
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.stores.database import DatabaseStore, open_engine
from celery_sharding.dedup.stores.memory import MemoryStore
from celery_sharding.dedup.stores.schema import records_table, row_id


@dataclass
class Place:
    """A store under test, and how to let time pass for one of its records, or to damage it, without waiting.

    `url` is the result backend that opens the same store in another process.
    """

    store: Store
    url: str
    pass_time: Callable[[str, float], None]
    set_version: Callable[[str, int], None]


def place_in_memory() -> Iterator[Place]:
    now = [1_700_000_000.0]

    def pass_time(key: str, seconds: float) -> None:
        now[0] += seconds

    def set_version(key: str, version: int) -> None:
        raise AssertionError("records in memory have no version")

    yield Place(MemoryStore(clock=lambda: now[0]), "cache+memory://", pass_time, set_version)


def place_in_redis(url: str) -> Iterator[Place]:
    client = redis.Redis.from_url(url)

    def pass_time(key: str, seconds: float) -> None:
        name = f"celery-sharding:dedup:{key}"
        until = client.hget(name, "until")
        if until is not None:
            client.hset(name, "until", int(until) - int(seconds * 1_000_000))
        client.pexpire(name, client.pttl(name) - int(seconds * 1_000))

    def set_version(key: str, version: int) -> None:
        client.hset(f"celery-sharding:dedup:{key}", "version", version)

    yield Place(store_for(Celery(backend=url, set_as_current=False)), url, pass_time, set_version)
    client.close()


def place_in_sqlite(path: Path) -> Iterator[Place]:
    yield from place_in_database(f"sqlite:///{path}")


def place_in_database(url: str) -> Iterator[Place]:
    engine = open_engine(url, {})
    table = records_table(sqlalchemy.MetaData())

    def change(key: str, **values: object) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.update(table).where(table.c.id == row_id(key)).values(**values))

    def pass_time(key: str, seconds: float) -> None:
        change(key, lease_until=table.c.lease_until - seconds, expires_at=table.c.expires_at - seconds)

    def set_version(key: str, version: int) -> None:
        change(key, version=version)

    yield Place(DatabaseStore(engine), f"db+{url}", pass_time, set_version)
    engine.dispose()
