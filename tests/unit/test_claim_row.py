"""What a run meets in the claims table, on a table in memory; the databases are in tests/contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery

from celery_sharding.dedup.claim_row import AlreadyDone, ClaimRow, Effects, commit_with_effects
from celery_sharding.dedup.results import ResultCodec
from celery_sharding.errors import ClaimLost, DeduplicationError

NOW = 1_000.0
MINE = ClaimRow("key", "mine", fencing=2, ttl_seconds=60)


class Rows:
    """A claims table with one row, which may vanish once while it is looked at."""

    def __init__(self, row: dict[str, Any] | None = None, *, vanishes: bool = False) -> None:
        self.row = self.committed = row
        self.vanishes = vanishes
        self.loses_row = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.row = self.committed
            raise
        self.committed = self.row

    @contextmanager
    def guard(self) -> Iterator[None]:
        yield

    def read_clock(self) -> float:
        return NOW

    def insert(self, columns: Mapping[str, Any]) -> bool:
        if self.row is not None:
            return False
        self.row = dict(columns)
        return True

    def replace_expired(self, columns: Mapping[str, Any], *, now: float) -> bool:
        if self.row is None or self.row["expires_at"] > now or self.row["fencing"] >= columns["fencing"]:
            return False
        self.row = dict(columns)
        return True

    def lock(self) -> tuple[float, bytes | None] | None:
        if self.vanishes:
            self.row, self.vanishes = None, False
        return None if self.row is None else (self.row["expires_at"], self.row["result"])

    def finish(self, result: bytes | None) -> bool:
        if self.row is None or self.loses_row:
            return False
        self.row = {**self.row, "result": result}
        return True

    def rolled_back(self) -> DeduplicationError:
        return DeduplicationError("rolled back")


def commit(rows: Rows, result: object = None) -> Effects:
    results = ResultCodec(Celery("shop", backend="cache+memory://", set_as_current=False), "key")
    with commit_with_effects(rows, MINE, result=result, results=results) as effects:
        return effects


def row_of_another(*, fencing: int, expires_at: float, result: bytes | None = b"theirs") -> dict[str, Any]:
    return {"token": "theirs", "fencing": fencing, "expires_at": expires_at, "result": result}


def test_the_first_run_writes_its_row_with_its_result() -> None:
    rows = Rows()
    commit(rows, result=42)
    assert rows.committed is not None
    assert (rows.committed["token"], rows.committed["expires_at"]) == ("mine", NOW + 60)
    assert rows.committed["result"].endswith(b"42")


def test_a_row_that_lives_ends_the_run_with_its_result() -> None:
    rows = Rows(row_of_another(fencing=1, expires_at=NOW + 1))
    with pytest.raises(AlreadyDone) as caught:
        commit(rows)
    assert caught.value.result == b"theirs"


def test_an_expired_row_of_an_earlier_run_is_replaced() -> None:
    rows = Rows(row_of_another(fencing=1, expires_at=NOW))
    commit(rows)
    assert rows.committed is not None
    assert rows.committed["token"] == "mine"


def test_an_expired_row_of_a_later_run_makes_this_one_stale() -> None:
    rows = Rows(row_of_another(fencing=3, expires_at=NOW))
    with pytest.raises(ClaimLost):
        commit(rows)
    assert rows.committed is not None
    assert rows.committed["token"] == "theirs"


def test_a_row_that_is_deleted_while_it_is_looked_at_is_written_anew() -> None:
    rows = Rows(row_of_another(fencing=3, expires_at=NOW), vanishes=True)
    commit(rows)
    assert rows.committed is not None
    assert rows.committed["token"] == "mine"


def test_a_transaction_that_has_lost_the_row_is_an_error() -> None:
    rows = Rows()
    rows.loses_row = True
    with pytest.raises(DeduplicationError, match="rolled back"):
        commit(rows)
    assert rows.committed is None
