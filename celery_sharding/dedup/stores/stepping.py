"""Stores that change a record by reading it, deciding in Python, and writing it back, as one atomic step.

A subclass provides that step: under a lock, or by compare-and-swap, repeated when another process was quicker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, TypeVar

from celery_sharding.dedup import claims
from celery_sharding.dedup.claims import Claimed, ClaimStore, Outcome, Record, Shown
from celery_sharding.dedup.owners import Owner, new_owner
from celery_sharding.errors import DamagedRecord

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Step(Protocol[T_co]):
    """One change of a record. Pure: a store may repeat it."""

    def __call__(self, record: Record | None, now: float) -> tuple[Record | None, T_co]:
        """Return the new record (None: keep the old one) and the answer; `now` is the store's time."""


class SteppingStore(ClaimStore, ABC):
    """A `ClaimStore` made of `change`."""

    @abstractmethod
    def change(self, key: str, step: Step[T]) -> T:
        """Do `step` on the record of `key` (None if there is none) and return its answer.

        Nothing else changes the record between read and write.
        """

    def check(self) -> None:
        owner = new_owner("check")
        key = f"celery-sharding:check:{owner.run_id}"
        self.claim(key, owner=owner, lease_seconds=1.0, ttl_seconds=1.0)
        self.renew(key, owner.run_id, lease_seconds=1.0)
        self.discard(key)

    @abstractmethod
    def discard(self, key: str) -> None:
        """Delete the record of `key`, whatever it is."""

    def claim(
        self, key: str, *, owner: Owner, lease_seconds: float, ttl_seconds: float, evict: str | None = None
    ) -> Outcome:
        def step(record: Record | None, now: float) -> tuple[Record | None, Outcome]:
            obstacle = claims.decide(record, owner=owner, evict=evict, now=now)
            if obstacle is not None:
                return None, obstacle
            taken = claims.claimed(record, owner=owner, lease_seconds=lease_seconds, ttl_seconds=ttl_seconds, now=now)
            return taken, Claimed(owner.run_id, taken.fencing)

        return self.change(key, step)

    def renew(self, key: str, token: str, *, lease_seconds: float) -> bool:
        return self._hold(key, token, state=claims.RUNNING, lease_seconds=lease_seconds)

    def park(self, key: str, token: str, *, lease_seconds: float) -> bool:
        return self._hold(key, token, state=claims.PARKED, lease_seconds=lease_seconds)

    def commit(self, key: str, token: str, *, result: bytes, ttl_seconds: float) -> bool:
        def step(record: Record | None, now: float) -> tuple[Record | None, bool]:
            if record is None or record.token != token or record.state not in (claims.RUNNING, claims.DONE):
                return None, False
            if record.state == claims.DONE:
                return None, True
            return claims.committed(record, result=result, ttl_seconds=ttl_seconds, now=now), True

        return self.change(key, step)

    def release(self, key: str, token: str) -> bool:
        def step(record: Record | None, now: float) -> tuple[Record | None, bool]:
            if record is None or record.token != token or record.state not in (claims.RUNNING, claims.PARKED):
                return None, False
            return claims.released(record), True

        return self.change(key, step)

    def show(self, key: str) -> Shown | None:
        def step(record: Record | None, now: float) -> tuple[None, Shown | None]:
            found = record is not None and record.expires_at > now
            return None, claims.shown(key, record, now=now) if found and record is not None else None

        return self.change(key, step)

    def forget(self, key: str, *, force: bool) -> bool:
        def step(record: Record | None, now: float) -> tuple[Record | None, bool]:
            if record is None:
                return None, True
            if not force and claims.is_held(record, now=now):
                return None, False
            return claims.forgotten(record), True

        try:
            return self.change(key, step)
        except DamagedRecord:
            if not force:
                raise
            self.discard(key)
            return True

    def _hold(self, key: str, token: str, *, state: str, lease_seconds: float) -> bool:
        def step(record: Record | None, now: float) -> tuple[Record | None, bool]:
            if record is None or record.token != token or record.state != claims.RUNNING:
                return None, False
            return claims.held(record, state=state, lease_seconds=lease_seconds, now=now), True

        return self.change(key, step)
