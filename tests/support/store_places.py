"""The stores under test, each with a way to let time pass for one record, and to damage it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pymemcache
import redis
import sqlalchemy

from celery_sharding.dedup.claims import ClaimStore
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.stores.database import DatabaseStore, open_engine
from celery_sharding.dedup.stores.filesystem import FilesystemStore
from celery_sharding.dedup.stores.memcached import MemcachedStore
from celery_sharding.dedup.stores.memory import MemoryStore
from celery_sharding.dedup.stores.records import row_id
from celery_sharding.dedup.stores.schema import records_table
from support.claiming_process import app_for

# Of a claim in seconds, where a test asks for none of its own.
LEASE, TTL = 60.0, 3_600.0


@dataclass
class Place:
    """A store under test, and how to let time pass for one of its records, or to damage it, without waiting.

    `url` is the result backend that opens the same store in another process.
    """

    store: ClaimStore
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


def place_in_redis(url: str, *, backend: str | None = None, prefix: str = "") -> Iterator[Place]:
    """The Redis at `url`, opened through the result backend `backend`, else through `url`."""
    client = redis.Redis.from_url(url)

    def name_of(key: str) -> str:
        return f"{prefix}celery-sharding:dedup:{key}"

    def pass_time(key: str, seconds: float) -> None:
        until = client.hget(name_of(key), "until")
        if until is not None:
            client.hset(name_of(key), "until", int(until) - int(seconds * 1_000_000))
        client.pexpire(name_of(key), client.pttl(name_of(key)) - int(seconds * 1_000))

    def set_version(key: str, version: int) -> None:
        assert client.exists(name_of(key))
        client.hset(name_of(key), "version", version)

    yield Place(store_for(app_for(backend or url)), backend or url, pass_time, set_version)
    client.close()


def place_in_database(url: str, *, backend: str | None = None) -> Iterator[Place]:
    """The database at `url`, opened through the result backend `backend`, else through SQLAlchemy's."""
    engine = open_engine(url, {})
    table = records_table(sqlalchemy.MetaData())

    def change(key: str, **values: object) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.update(table).where(table.c.id == row_id(key)).values(**values))

    def pass_time(key: str, seconds: float) -> None:
        change(key, lease_until=table.c.lease_until - seconds)
        change(key, expires_at=table.c.expires_at - seconds)

    def set_version(key: str, version: int) -> None:
        change(key, version=version)

    store = store_for(app_for(backend)) if backend else DatabaseStore(engine)
    yield Place(store, backend or f"db+{url}", pass_time, set_version)
    engine.dispose()


def place_in_memcached(url: str) -> Iterator[Place]:
    store = store_for(app_for(url))
    assert isinstance(store, MemcachedStore)
    client = pymemcache.Client(_address(store), default_noreply=False)

    def change(key: str, edit: Callable[[bytes], bytes]) -> None:
        data = client.get(store.name_of(key))
        if data is not None:
            assert client.set(store.name_of(key), edit(data))

    yield Place(store, url, *_edits(change))
    client.close()


def place_in_files(folder: Path) -> Iterator[Place]:
    url = f"file://{folder}"
    store = store_for(app_for(url))
    assert isinstance(store, FilesystemStore)

    def change(key: str, edit: Callable[[bytes], bytes]) -> None:
        path = store.path_of(key)
        data = edit(path.read_bytes())
        path.write_bytes(data)
        expires_at = json.loads(data.partition(b"\n")[0])["expires_at"]
        os.utime(path, (expires_at, expires_at))

    yield Place(store, url, *_edits(change))


def _edits(
    change: Callable[[str, Callable[[bytes], bytes]], None],
) -> tuple[Callable[[str, float], None], Callable[[str, int], None]]:
    """Return `pass_time` and `set_version` for records that are JSON and a result."""

    def edited(data: bytes, *, seconds: float = 0, **values: object) -> bytes:
        header, _, result = data.partition(b"\n")
        fields = json.loads(header)
        times = {name: fields[name] - seconds for name in ("lease_until", "expires_at")}
        return json.dumps({**fields, **times, **values}).encode() + b"\n" + result

    def pass_time(key: str, seconds: float) -> None:
        change(key, lambda data: edited(data, seconds=seconds))

    def set_version(key: str, version: int) -> None:
        change(key, lambda data: edited(data, version=version))

    return pass_time, set_version


def _address(store: MemcachedStore) -> str:
    (address,) = store.servers
    return address
