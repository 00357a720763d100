"""What claim stores in databases promise beyond what every store does."""

from __future__ import annotations

import random
import threading
import uuid

import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy import Engine

from celery_sharding.dedup.claims import Claimed
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.stores.database import DatabaseStore, open_engine
from celery_sharding.dedup.stores.schema import read_clock
from support.store_places import Place
from support.store_servers import MariaDB

DATABASES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("sqlite", "postgresql", "mariadb")]


@pytest.fixture(params=DATABASES)
def place(request: pytest.FixtureRequest) -> Place:
    place = request.getfixturevalue(f"in_{request.param}")
    place.store.show("makes the table")
    with _engine(place).begin() as connection:
        connection.execute(sqlalchemy.text("DELETE FROM celery_sharding_dedup"))
    return place


def test_expired_records_are_purged_in_batches(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_sharding.dedup.stores.database._PURGE_BATCH", 2)
    # Given five records whose time is over, and one whose time is not
    prefix = uuid.uuid4().hex
    for name in ("1", "2", "3", "4", "5", "new"):
        key = f"{prefix}.{name}"
        place.store.commit(key, _claim(place, key).token, result=b"1", ttl_seconds=60)
        if name != "new":
            place.pass_time(key, 61)
    # When the app's records are purged, then the five are gone
    store = store_for(Celery(backend=place.url, set_as_current=False))
    assert store.purge() == 5
    assert store.purge() == 0
    assert place.store.show(f"{prefix}.new") is not None


def test_claims_go_on_while_others_purge(place: Place) -> None:
    # Given processes that purge all the time, while records expire at once
    stop, errors = threading.Event(), []
    _claim(place, "first")

    def work(step: object) -> None:
        store = DatabaseStore(_engine(place))
        try:
            while not stop.is_set():
                step(store)  # type: ignore[operator]
        except Exception as exc:
            errors.append(exc)

    def claim(store: DatabaseStore) -> None:
        key = f"key.{random.randrange(300)}"
        outcome = store.claim(key, owner=new_owner("a task"), lease_seconds=1e-4, ttl_seconds=1e-4)
        if isinstance(outcome, Claimed):
            store.commit(key, outcome.token, result=b"1", ttl_seconds=1e-4)

    # When they run side by side
    threads = [threading.Thread(target=work, args=(step,)) for step in (claim, claim, claim, DatabaseStore.purge)]
    threads.append(threading.Thread(target=work, args=(DatabaseStore.purge,)))
    for thread in threads:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in threads:
        thread.join(60)
    # Then nobody fails
    assert errors == []


@pytest.mark.parametrize("place", DATABASES[1:], indirect=True)
def test_a_connection_that_the_server_has_closed_costs_nothing(place: Place) -> None:
    # Given a claim
    engine = _engine(place)
    first = _claim(place, key := uuid.uuid4().hex)
    # When the server closes all connections but the one that asks for it
    with open_engine(place.url.removeprefix("db+"), {}).connect() as admin:
        if engine.dialect.name == "postgresql":
            admin.execute(
                sqlalchemy.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
            )
        else:
            own = admin.execute(sqlalchemy.text("SELECT CONNECTION_ID()")).scalar_one()
            for (number,) in admin.execute(sqlalchemy.text("SELECT id FROM information_schema.processlist")).all():
                if number != own:
                    admin.exec_driver_sql(f"KILL {number}")
    # Then the commit does not notice
    assert place.store.commit(key, first.token, result=b"1", ttl_seconds=60)


@pytest.mark.xdist_group("mariadb")
def test_the_clock_of_mariadb_is_the_same_when_local_times_come_twice(mariadb: MariaDB) -> None:
    with open_engine(mariadb.url, {}).connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT @@system_time_zone")).scalar_one() in ("CET", "CEST")
        for seconds in (1_761_438_600, 1_761_442_200):  # half past two, twice
            connection.exec_driver_sql(f"SET timestamp = {seconds}")
            assert read_clock(connection) == seconds


def _claim(place: Place, key: str) -> Claimed:
    outcome = place.store.claim(key, owner=new_owner("task-1"), lease_seconds=60, ttl_seconds=3_600)
    assert isinstance(outcome, Claimed)
    return outcome


def _engine(place: Place) -> Engine:
    assert isinstance(place.store, DatabaseStore)
    return place.store._engine
