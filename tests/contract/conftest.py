"""The claim stores, and the servers that keep them, which are started when the first test asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_places import Place, place_in_database, place_in_memory, place_in_redis, place_in_sqlite
from store_servers import MariaDB, Postgres


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    with MariaDB() as server:
        yield server


@pytest.fixture
def in_memory() -> Iterator[Place]:
    yield from place_in_memory()


@pytest.fixture
def in_redis(redis_url: str) -> Iterator[Place]:
    yield from place_in_redis(redis_url)


@pytest.fixture
def in_sqlite(tmp_path: Path) -> Iterator[Place]:
    yield from place_in_sqlite(tmp_path / "claims.sqlite")


@pytest.fixture
def in_postgresql(postgresql: Postgres) -> Iterator[Place]:
    yield from place_in_database(postgresql.url)


@pytest.fixture
def in_mariadb(mariadb: MariaDB) -> Iterator[Place]:
    yield from place_in_database(mariadb.url)
