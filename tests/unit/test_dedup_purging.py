"""Expired claims are deleted, others are not: in the claim store, and in the tables of `claim.transaction`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from django.db import connections
from django.test.utils import modify_settings
from sqlalchemy import create_engine, insert, select
from sqlalchemy.orm import Session

from celery_sharding.dedup import claim_metadata, purge_claims
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for
from support.shop_databases import open_shop

ROWS = {"old": 1.0, "new": 1e12}


# After the tests of Django's stores, whose settings this process then has.
pytestmark = pytest.mark.xdist_group("django")


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("shop", backend=f"db+sqlite:///{tmp_path}/results.sqlite", set_as_current=False)
    app.conf.task_always_eager = True
    app.conf.imports = ["celery_sharding.dedup.tasks"]
    app.loader.import_default_modules()
    yield app
    app.close()


def test_the_task_for_beat_deletes_expired_records(app: Celery) -> None:
    # Given an expired record, and one that is not
    store = store_for(app)
    for key, ttl_seconds in (("old", 1e-6), ("new", 60)):
        owner = new_owner("t")
        store.claim(key, owner=owner, lease_seconds=60, ttl_seconds=60)
        store.commit(key, owner.run_id, result=b"1", ttl_seconds=ttl_seconds)
    # When the task runs, then it deletes one
    purge = app.tasks["celery_sharding.purge_claims"]
    assert [purge.delay().get() for _ in range(2)] == [1, 0]
    assert store.show("new") is not None


def test_expired_rows_of_a_claims_table_are_deleted(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.sqlite")
    claim_metadata.create_all(engine)
    table = claim_metadata.tables["celery_sharding_claims"]
    with Session(engine) as session:
        for key, expires_at in ROWS.items():
            session.execute(insert(table).values(id=key, key=key, token="t", fencing=1, expires_at=expires_at))
        session.commit()
        assert purge_claims(session) == 1
    with engine.connect() as connection:
        assert connection.scalars(select(table.c.key)).all() == ["new"]
    engine.dispose()


def test_the_task_deletes_expired_rows_of_djangos_databases_that_have_the_table(app: Celery, tmp_path: Path) -> None:
    purge = app.tasks["celery_sharding.purge_claims"]
    with open_shop("django", f"sqlite:///{tmp_path}/shop.sqlite"):
        from celery_sharding.django.models import Claim

        for key, expires_at in ROWS.items():
            Claim.objects.using("shop").create(id=key, key=key, token="t", fencing=1, expires_at=expires_at)
        # When the app is not in use, then its table is left alone
        with modify_settings(INSTALLED_APPS={"remove": "celery_sharding.django"}):
            assert purge.delay().get() == 0
        # When it is, then the expired row is deleted, and a database without the table is no obstacle
        result: Any = purge.delay().get()
        assert result == 1
        assert [row.key for row in Claim.objects.using("shop").all()] == ["new"]
        assert "default" in connections
