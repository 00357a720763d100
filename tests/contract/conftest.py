"""The claim stores, and the servers that keep them, which are started when the first test asks.

The tests of a store run in one process of a parallel run, so that its servers are started once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.store_places import (
    Place,
    place_in_database,
    place_in_files,
    place_in_memcached,
    place_in_memory,
    place_in_redis,
)
from support.store_servers import ClusterRedis, MariaDB, Memcached, Postgres, Sentinel

# Store → the tests that share a process with it.
GROUPS = {
    **dict.fromkeys(["redis", "redis_cluster", "sentinel", "memcached", "memory"], "redis"),
    **dict.fromkeys(["sqlite", "files"], "files"),
    "postgresql": "postgresql",
    "mariadb": "mariadb",
    **dict.fromkeys(["django_sqlite", "django_postgresql", "django_redis", "django_memcached"], "django"),
}
STORES = [pytest.param(name, marks=pytest.mark.xdist_group(group)) for name, group in GROUPS.items()]
SHARED = [store for store in STORES if store.values != ("memory",)]


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest) -> Place:
    """Each of the stores."""
    return request.getfixturevalue(f"in_{request.param}")


@pytest.fixture(params=SHARED)
def shared(request: pytest.FixtureRequest) -> Place:
    """The stores that several processes see."""
    return request.getfixturevalue(f"in_{request.param}")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    with MariaDB() as server:
        yield server


@pytest.fixture(scope="session")
def memcached() -> Iterator[Memcached]:
    with Memcached() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[ClusterRedis]:
    with ClusterRedis() as server:
        yield server


@pytest.fixture(scope="session")
def sentinel() -> Iterator[Sentinel]:
    with Sentinel() as server:
        yield server


@pytest.fixture(scope="session")
def django_variables(
    tmp_path_factory: pytest.TempPathFactory, postgresql: Postgres, mariadb: MariaDB, memcached: Memcached
) -> dict[str, str]:
    """What the settings in `django_project.py` are made of; Django reads them once for each process."""
    return {
        "DJANGO_SETTINGS_MODULE": "support.django_project",
        "DJANGO_SQLITE": str(tmp_path_factory.mktemp("django") / "project.sqlite"),
        "DJANGO_POSTGRESQL": postgresql.url,
        "DJANGO_MARIADB": mariadb.url,
        "DJANGO_MEMCACHED": memcached.address,
    }


@pytest.fixture
def django_project(django_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Django project of `django_project.py`; returns its SQLite file. Workers of other tests know nothing of it."""
    for name, value in django_variables.items():
        monkeypatch.setenv(name, value)
    return Path(django_variables["DJANGO_SQLITE"])


@pytest.fixture
def in_memory() -> Iterator[Place]:
    yield from place_in_memory()


@pytest.fixture
def in_redis(redis_url: str) -> Iterator[Place]:
    yield from place_in_redis(redis_url)


@pytest.fixture
def in_redis_cluster(redis_cluster: ClusterRedis) -> Iterator[Place]:
    yield from place_in_redis(redis_cluster.url)


@pytest.fixture
def in_sentinel(sentinel: Sentinel) -> Iterator[Place]:
    yield from place_in_redis(sentinel.primary.url, backend=sentinel.backend)


@pytest.fixture
def in_sqlite(tmp_path: Path) -> Iterator[Place]:
    yield from place_in_database(f"sqlite:///{tmp_path}/claims.sqlite")


@pytest.fixture
def in_files(tmp_path: Path) -> Iterator[Place]:
    yield from place_in_files(tmp_path)


@pytest.fixture
def in_postgresql(postgresql: Postgres) -> Iterator[Place]:
    yield from place_in_database(postgresql.url)


@pytest.fixture
def in_mariadb(mariadb: MariaDB) -> Iterator[Place]:
    yield from place_in_database(mariadb.url)


@pytest.fixture
def in_memcached(memcached: Memcached) -> Iterator[Place]:
    yield from place_in_memcached(memcached.url)


@pytest.fixture
def in_django_sqlite(django_project: Path) -> Iterator[Place]:
    yield from place_in_database(f"sqlite:///{django_project}", backend="django-db/default")


@pytest.fixture
def in_django_postgresql(django_project: Path, postgresql: Postgres) -> Iterator[Place]:
    yield from place_in_database(postgresql.url, backend="django-db/postgresql")


@pytest.fixture
def in_django_redis(django_project: Path, redis_url: str) -> Iterator[Place]:
    yield from place_in_redis(redis_url, backend="django-cache/redis")


@pytest.fixture
def in_django_memcached(django_project: Path) -> Iterator[Place]:
    yield from place_in_memcached("django-cache/memcached")
