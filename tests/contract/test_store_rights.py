"""A worker starts only if claims can be written, and says which right is missing; an outage does not keep it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import create_engine, inspect, text

from celery_sharding import deduplicate
from celery_sharding.dedup.claims import Claimed, Done
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import check_tasks, store_for
from celery_sharding.errors import NoUsableStore
from celery_sharding.testing.redis_node import RedisNode
from support.store_servers import Postgres

RIGHTS = "+client +hello +select +eval +evalsha +hset +hmget +hdel +hstrlen +del +exists +type +time"
RIGHTS += " +pexpire +pttl"
SCHEMAS = {"task": "results", "group": "results"}


def app_for(backend: str, **settings: object) -> Celery:
    app = Celery("rights", broker="memory://", backend=backend, set_as_current=False)
    app.conf.update(settings)

    @app.task(name="pay", shared=False)
    @deduplicate
    def pay() -> None: ...

    app.finalize()
    return app


@pytest.fixture
def limited(postgresql: Postgres) -> Iterator[str]:
    """The URL of a user of PostgreSQL who owns the schema `results`, and may do nothing in `public`."""
    admin = create_engine(postgresql.url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("REVOKE ALL ON SCHEMA public FROM PUBLIC"))
        connection.execute(text("CREATE ROLE limited LOGIN"))
        connection.execute(text("CREATE SCHEMA results AUTHORIZATION limited"))
    yield postgresql.url.replace("sharding@", "limited@")
    with admin.connect() as connection:
        connection.execute(text("DROP OWNED BY limited CASCADE"))
        connection.execute(text("DROP ROLE limited"))
        connection.execute(text("GRANT ALL ON SCHEMA public TO PUBLIC"))
    admin.dispose()


@pytest.mark.xdist_group("postgresql")
def test_claims_stand_in_the_schema_of_the_results(postgresql: Postgres, limited: str) -> None:
    # Given a user who may write in one schema only, which Celery is told
    app = app_for(f"db+{limited}", database_table_schemas=SCHEMAS)
    # When a worker starts, and a task claims and commits
    check_tasks(app)
    store, owner = store_for(app), new_owner("task")
    outcome = store.claim("key", owner=owner, lease_seconds=10, ttl_seconds=60)
    assert isinstance(outcome, Claimed)
    assert store.commit("key", outcome.token, result=b"1", ttl_seconds=60)
    # Then its claim stands there, found by others, purged and forgotten
    again = store_for(app_for(f"db+{limited}", database_table_schemas=SCHEMAS))
    assert again.claim("key", owner=new_owner("other"), lease_seconds=10, ttl_seconds=60) == Done(b"1")
    assert again.forget("key", force=False)
    assert again.purge() == 0
    engine = create_engine(postgresql.url)
    assert inspect(engine).has_table("celery_sharding_dedup", schema="results")
    # And the check has left nothing
    with engine.connect() as connection:
        assert connection.execute(text("SELECT key FROM results.celery_sharding_dedup")).scalars().all() == ["key"]
    engine.dispose()


@pytest.mark.xdist_group("postgresql")
def test_a_worker_without_a_right_in_its_schema_does_not_start(limited: str) -> None:
    with pytest.raises(NoUsableStore, match=r"cannot be written.*(no schema|permission denied)"):
        check_tasks(app_for(f"db+{limited}", database_create_tables_at_setup=False))


@pytest.mark.xdist_group("postgresql")
def test_a_worker_that_may_not_write_an_existing_table_does_not_start(postgresql: Postgres, limited: str) -> None:
    # Given a table of claims that another user has made
    check_tasks(app_for(f"db+{postgresql.url}", database_table_schemas=SCHEMAS))
    admin = create_engine(postgresql.url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("GRANT SELECT ON results.celery_sharding_dedup TO limited"))
    app = app_for(f"db+{limited}", database_table_schemas=SCHEMAS, database_create_tables_at_setup=False)
    # When the worker may only read it, then it does not start
    with pytest.raises(NoUsableStore, match=r"permission denied.*grant SELECT, INSERT, UPDATE and DELETE"):
        check_tasks(app)
    # And with all rights it does
    with admin.connect() as connection:
        connection.execute(text("GRANT INSERT, UPDATE, DELETE ON results.celery_sharding_dedup TO limited"))
    check_tasks(app)
    admin.dispose()


@pytest.fixture
def redis() -> Iterator[RedisNode]:
    with RedisNode() as node:
        yield node


@pytest.mark.parametrize(
    ("missing", "keys"),
    [("+hset", "~*"), ("+evalsha", "~*"), ("+pexpire", "~*"), ("", "~celery-task-meta-*")],
    ids=["writing", "scripts", "expiry", "keys"],
)
def test_a_worker_whose_redis_user_lacks_a_right_does_not_start(redis: RedisNode, missing: str, keys: str) -> None:
    rights = [right for right in RIGHTS.split() if right != missing]
    Redis.from_url(redis.url).execute_command("ACL", "SETUSER", "limited", "on", ">secret-word", keys, *rights)
    with pytest.raises(NoUsableStore, match="cannot be written") as caught:
        check_tasks(app_for(redis.url.replace("redis://", "redis://limited:secret-word@")))
    assert "secret-word" not in f"{caught.value}{caught.value.facts}"


def test_a_redis_user_with_the_rights_that_are_named_serves(redis: RedisNode) -> None:
    client = Redis.from_url(redis.url)
    client.execute_command("ACL", "SETUSER", "limited", "on", ">word", "~celery-sharding:dedup:*", *RIGHTS.split())
    check_tasks(app_for(redis.url.replace("redis://", "redis://limited:word@")))


def test_a_worker_of_a_replica_or_with_a_wrong_password_does_not_start(redis: RedisNode) -> None:
    client = Redis.from_url(redis.url)
    with pytest.raises(NoUsableStore, match="cannot be written"):
        check_tasks(app_for(redis.url.replace("redis://", "redis://nobody:wrong@")))
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(NoUsableStore, match=r"on a primary"):
        check_tasks(app_for(redis.url))


def test_a_worker_starts_while_its_store_is_away_and_says_so(
    redis: RedisNode, caplog: pytest.LogCaptureFixture
) -> None:
    redis.stop()
    with caplog.at_level(logging.WARNING):
        check_tasks(app_for(redis.url))
    assert "deduplicated tasks wait for it" in caplog.text


def test_a_worker_that_may_not_write_its_folder_does_not_start(tmp_path: Path) -> None:
    # Given a place for claims that takes no files, whoever writes them
    (tmp_path / "celery-sharding-dedup").symlink_to("/sys/kernel")
    with pytest.raises(NoUsableStore, match="cannot be written"):
        check_tasks(app_for(f"file://{tmp_path}"))
