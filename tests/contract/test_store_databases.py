"""What claim stores in databases promise beyond what every store does."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import sqlalchemy
from celery import Celery
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from store_places import Place
from store_servers import MariaDB

from celery_sharding.dedup.claims import Claimed
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.stores.database import DatabaseStore, open_engine
from celery_sharding.dedup.stores.schema import claims_table, read_clock
from celery_sharding.dedup.transaction import AlreadyDone, commit_with_effects
from celery_sharding.errors import DeduplicationError

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


def test_of_duplicates_that_wait_for_a_transaction_all_find_it_done(place: Place) -> None:
    # Given a transaction that has written its claim, and four duplicates that wait for it
    engine = _engine(place)
    metadata = sqlalchemy.MetaData()
    rows = claims_table(metadata, f"claims_{uuid.uuid4().hex[:8]}")
    effects = sqlalchemy.Table(f"effects_{uuid.uuid4().hex[:8]}", metadata, sqlalchemy.Column("n", sqlalchemy.Integer))
    metadata.create_all(engine)
    ends: list[object] = []
    first_is_in, others_began = threading.Event(), threading.Semaphore(0)

    def run(number: int) -> None:
        try:
            with Session(engine) as session:
                if number:
                    first_is_in.wait(60)
                    others_began.release()
                with commit_with_effects(
                    session, key="any\0text", token=f"t{number}", fencing=number + 1, ttl_seconds=60, table=rows,
                    result=None, encode=lambda value: b"",
                ):  # fmt: skip
                    session.execute(insert(effects).values(n=number))
                    first_is_in.set()
                    for _ in range(4):
                        others_began.acquire(timeout=60)
                    threading.Event().wait(0.3)  # until they wait in the database, which says nothing of it
            ends.append("committed")
        except BaseException as exc:
            ends.append(exc)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    # When it commits
    for thread in threads:
        thread.join(60)
    # Then each of them is told so
    assert ends.count("committed") == 1, ends
    assert [type(end) for end in ends].count(AlreadyDone) == 4
    with engine.begin() as connection:
        assert connection.scalars(select(effects.c.n)).all() == [0]
    metadata.drop_all(engine)


@pytest.fixture
def shop(place: Place) -> Iterator[Ledger]:
    ledger = Ledger(_engine(place))
    yield ledger
    ledger.metadata.drop_all(ledger.engine)


class Ledger:
    """Tables of a user's, a claims table among them, in the database of the store."""

    def __init__(self, engine: Engine) -> None:
        # As a user makes one: the store's own begins and commits in ways of its own.
        self.engine = sqlalchemy.create_engine(engine.url)
        self.metadata = sqlalchemy.MetaData()
        name = uuid.uuid4().hex[:8]
        self.claims = claims_table(self.metadata, f"claims_{name}")
        self.effects = sqlalchemy.Table(
            f"effects_{name}", self.metadata, sqlalchemy.Column("n", sqlalchemy.Integer), mysql_engine="InnoDB"
        )
        self.metadata.create_all(self.engine)

    def transaction(self, session: Session, token: str = "mine", fencing: int = 1) -> AbstractContextManager[object]:
        return commit_with_effects(
            session, key="key", token=token, fencing=fencing, ttl_seconds=60, table=self.claims, result=None,
            encode=lambda value: b"",
        )  # fmt: skip

    def write(self, session: Session) -> None:
        session.execute(insert(self.effects).values(n=1))

    def counts(self) -> tuple[int, int]:
        """How many effects there are, and how many claims."""
        with self.engine.connect() as connection:
            effects, claims = (
                connection.execute(select(sqlalchemy.func.count()).select_from(table)).scalar_one()
                for table in (self.effects, self.claims)
            )
        return effects, claims


def test_an_error_of_the_database_that_was_caught_never_parts_effects_and_claim(shop: Ledger) -> None:
    # When a statement fails, and the task goes on
    told: Exception | None = None
    try:
        with Session(shop.engine) as session, shop.transaction(session):
            shop.write(session)
            with pytest.raises(DBAPIError):
                session.execute(sqlalchemy.text("SELECT * FROM no_such_table"))
    except DeduplicationError as exc:
        told = exc
    # Then both stand, or neither and the task is told: PostgreSQL refuses what comes after an error
    assert shop.counts() == ((1, 1) if told is None else (0, 0))
    assert (told is not None) is (shop.engine.dialect.name == "postgresql")


def test_effects_do_not_commit_without_the_claim_that_the_database_rolled_back(shop: Ledger) -> None:
    def work(session: Session) -> None:
        session.connection().exec_driver_sql("ROLLBACK")
        shop.write(session)

    # When the database rolls back by itself, as for a deadlock, and the task writes again
    with (
        pytest.raises(DeduplicationError, match="rolled the transaction"),
        Session(shop.engine) as session,
        shop.transaction(session),
    ):
        work(session)
    # Then nothing stands
    assert shop.counts() == (0, 0)


def test_a_run_that_has_read_before_another_committed_finds_it_done(shop: Ledger) -> None:
    # Given a session that has read, at the isolation level where it goes on seeing what it saw
    is_sqlite = shop.engine.dialect.name == "sqlite"
    engine = shop.engine if is_sqlite else shop.engine.execution_options(isolation_level="REPEATABLE READ")
    with Session(engine) as late:
        late.execute(select(shop.claims)).all()
        if is_sqlite:
            late.rollback()  # there a reader keeps others from writing
        with Session(shop.engine) as session, shop.transaction(session, token="theirs"):
            shop.write(session)
        # When it comes to write, then it is told in a moment, whatever it can see
        with pytest.raises((AlreadyDone, DBAPIError)), shop.transaction(late):
            shop.write(late)
    assert shop.counts() == (1, 1)


def test_an_engine_that_commits_each_statement_is_refused(shop: Ledger) -> None:
    engine = sqlalchemy.create_engine(shop.engine.url, isolation_level="AUTOCOMMIT")
    with pytest.raises(DeduplicationError, match="AUTOCOMMIT"), Session(engine) as session, shop.transaction(session):
        shop.write(session)
    assert shop.counts() == (0, 0)


def test_a_session_that_writes_to_a_second_database_is_refused(shop: Ledger, tmp_path: Path) -> None:
    other = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'other.sqlite'}")
    elsewhere = sqlalchemy.Table("elsewhere", sqlalchemy.MetaData(), sqlalchemy.Column("n", sqlalchemy.Integer))
    elsewhere.create(other)
    with (
        pytest.raises(DeduplicationError, match="second database"),
        Session(shop.engine, binds={elsewhere: other}) as session,
        shop.transaction(session),
    ):
        session.execute(insert(elsewhere).values(n=1))
    assert shop.counts() == (0, 0)
    with other.connect() as connection:
        assert connection.execute(select(elsewhere)).all() == []


def _claim(place: Place, key: str) -> Claimed:
    outcome = place.store.claim(key, owner=new_owner("task-1"), lease_seconds=60, ttl_seconds=3_600)
    assert isinstance(outcome, Claimed)
    return outcome


def _engine(place: Place) -> Engine:
    assert isinstance(place.store, DatabaseStore)
    return place.store._engine
