"""How long a claim and its commit take, alone, and beside a million others; and how much room these take.

One process, one key after the other, as the process of a pool would: no task, no worker. What is filled in are finished
claims of the same make, copied within the server.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from redis import Redis
from sqlalchemy import text

from benchmarks.results import Row, Setup, limit
from celery_sharding.dedup.claims import Claimed, ClaimStore, Done
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores.database import DatabaseStore, open_engine
from celery_sharding.dedup.stores.redis import RedisStore
from support.store_servers import Postgres

LEASE_SECONDS, TTL_SECONDS = 60.0, 86_400.0
RESULT = b"1 result application/json utf-8\nnull"
AT_MOST_MS = {"Redis": 0.3, "PostgreSQL": 2.0}
BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Kept:
    """A store, and how to look at it from its server's side."""

    name: str
    store: ClaimStore
    fill: Callable[[str, int], None]
    size_bytes: Callable[[], int]


def run(setup: Setup) -> list[Row]:
    """A claim and its commit: at most 0.3 ms on Redis, 2 ms on PostgreSQL, in the median."""
    rows = []
    with in_redis(setup) as redis, in_postgresql() as postgresql:
        for kept in (redis, postgresql):
            each = measure(kept.store, setup.scaled(5_000))
            rows.append(limit(f"claim and commit, {kept.name}", None, each, unit="ms", at_most=AT_MOST_MS[kept.name]))
            count = setup.scaled(1_000_000)
            before = kept.size_bytes()
            kept.fill(model(kept.store), count)
            size_bytes = (kept.size_bytes() - before) / count
            beside = measure(kept.store, setup.scaled(5_000))
            setup.say(
                f"{kept.name}: claim and commit {each:.2f} ms; beside {count:,} claims of {size_bytes:.0f} bytes, "
                f"{beside:.2f} ms, of a duplicate {duplicates(kept.store, setup.scaled(5_000)):.2f} ms"
            )
    return rows


def measure(store: ClaimStore, count: int) -> float:
    """Return the median of claim and commit together, in milliseconds."""
    name, times = uuid.uuid4().hex, []
    for number in range(count):
        key, owner = f"bench:{name}-{number}", new_owner(str(uuid.uuid4()))
        started = time.perf_counter()
        claim = store.claim(key, owner=owner, lease_seconds=LEASE_SECONDS, ttl_seconds=TTL_SECONDS)
        assert isinstance(claim, Claimed)
        assert store.commit(key, claim.token, result=RESULT, ttl_seconds=TTL_SECONDS)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1_000


def duplicates(store: ClaimStore, count: int) -> float:
    """Return the median time that a duplicate takes to learn that it is one, in milliseconds."""
    key, times = model(store), []
    for _ in range(count):
        owner = new_owner(str(uuid.uuid4()))
        started = time.perf_counter()
        found = store.claim(key, owner=owner, lease_seconds=LEASE_SECONDS, ttl_seconds=TTL_SECONDS)
        times.append(time.perf_counter() - started)
        assert isinstance(found, Done)
    return statistics.median(times) * 1_000


def model(store: ClaimStore) -> str:
    """Finish a claim and return its key."""
    key, owner = f"shop.apply:{uuid.uuid4()}", new_owner(str(uuid.uuid4()))
    claim = store.claim(key, owner=owner, lease_seconds=LEASE_SECONDS, ttl_seconds=TTL_SECONDS)
    assert isinstance(claim, Claimed)
    assert store.commit(key, claim.token, result=RESULT, ttl_seconds=TTL_SECONDS)
    return key


@contextmanager
def in_redis(setup: Setup) -> Iterator[Kept]:
    prefix = f"bench-{uuid.uuid4().hex[:8]}:"
    with Redis.from_url(setup.redis_url) as client:

        def fill(key: str, count: int) -> None:
            for first in range(0, count, BATCH):
                with client.pipeline(transaction=False) as pipeline:
                    for number in range(first, min(first + BATCH, count)):
                        pipeline.copy(f"{prefix}{key}", f"{prefix}{key[:-8]}{number:08}")
                    pipeline.execute()

        try:
            yield Kept(
                "Redis",
                RedisStore(client, prefix=prefix),
                fill,
                lambda: int(client.info("memory")["used_memory"]),
            )
        finally:
            for key in client.scan_iter(f"{prefix}*", count=BATCH):
                client.unlink(key)


@contextmanager
def in_postgresql() -> Iterator[Kept]:
    with Postgres() as server:
        engine = open_engine(server.url, {})
        columns = "version, state, token, fencing, owner, lease_until, expires_at, attempts, result"

        def fill(key: str, count: int) -> None:
            with engine.begin() as connection:
                connection.execute(
                    text(
                        f"INSERT INTO celery_sharding_dedup (id, key, {columns}) SELECT "
                        f"encode(sha256((key || number)::bytea), 'hex'), key || number, {columns} "
                        "FROM celery_sharding_dedup, generate_series(1, :count) AS number WHERE key = :key"
                    ),
                    {"count": count, "key": key},
                )

        def size_bytes() -> int:
            with engine.connect() as connection:
                size = connection.execute(text("SELECT pg_total_relation_size('celery_sharding_dedup')"))
                return int(size.scalar_one())

        yield Kept("PostgreSQL", DatabaseStore(engine), fill, size_bytes)
        engine.dispose()
