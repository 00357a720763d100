"""Which result backends keep claims, and which are refused."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

import pytest
from celery import Celery

from celery_sharding import deduplicate
from celery_sharding.dedup.claims import Claimed, ClaimStore, Done
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import check_tasks, store_for
from celery_sharding.dedup.stores.database import DatabaseStore
from celery_sharding.dedup.stores.redis import RedisStore
from celery_sharding.errors import NoUsableStore
from support.claiming_process import app_for
from support.store_servers import Memcached

pytestmark = pytest.mark.xdist_group("django")


@pytest.mark.parametrize(
    ("backend", "kind"), [("django-db/mariadb", DatabaseStore), ("django-cache/django-redis", RedisStore)]
)
def test_a_claim_is_kept_by(django_project: Path, redis_url: str, backend: str, kind: type) -> None:
    store = store_for(app_for(backend))
    assert isinstance(store, kind)
    _commit(store, key := uuid.uuid4().hex)
    assert _claim(store_for(app_for(backend)), key) == Done(b"1")


def test_a_cache_in_a_django_database_keeps_claims_beside_itself(django_project: Path, redis_url: str) -> None:
    _commit(store_for(app_for("django-cache/database")), key := uuid.uuid4().hex)
    assert _claim(store_for(app_for("django-db/default")), key) == Done(b"1")


def test_a_claim_is_no_part_of_the_transaction_that_a_task_is_in(django_project: Path, redis_url: str) -> None:
    store = store_for(app_for("django-db/postgresql"))
    from django.db import transaction

    # Given a claim that is committed inside a transaction of the same database
    with transaction.atomic(using="postgresql"):
        _commit(store, key := uuid.uuid4().hex)
        transaction.set_rollback(True, using="postgresql")
    # When that is rolled back, then the claim stays
    assert _claim(store, key) == Done(b"1")


@pytest.mark.parametrize("backend", ["django-cache/default", "django-cache/files", "django-db/memory"])
def test_what_django_keeps_without_an_atomic_step_is_refused(
    django_project: Path, redis_url: str, backend: str
) -> None:
    with pytest.raises(NoUsableStore, match=r"Usable ones: redis://.*django-db"):
        check_tasks(_with_a_task(app_for(backend)))


def test_a_django_cache_in_memory_serves_one_process_only(django_project: Path, redis_url: str) -> None:
    app = _with_a_task(app_for("django-cache/memory"))
    check_tasks(app, has_child_processes=False)
    with pytest.raises(NoUsableStore, match="child process"):
        check_tasks(app, has_child_processes=True)


def test_a_worker_with_claims_in_memcached_says_what_may_be_forgotten(
    memcached: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_tasks(_with_a_task(app_for(memcached.url)))
    assert "shop.pay" in caplog.text
    assert "Start it with -M" in caplog.text


def _with_a_task(app: Celery) -> Celery:
    @app.task(shared=False, name="shop.pay")
    @deduplicate(key="number")
    def pay(number: int) -> None: ...

    return app


def _claim(store: ClaimStore, key: str) -> object:
    return store.claim(key, owner=new_owner("t"), lease_seconds=60, ttl_seconds=60)


def _commit(store: ClaimStore, key: str) -> None:
    outcome = _claim(store, key)
    assert isinstance(outcome, Claimed)
    assert store.commit(key, outcome.token, result=b"1", ttl_seconds=60)
