"""The claim as the running task sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from celery_sharding.dedup.claim_row import AlreadyDone, ClaimRow, ClaimsTable, Effects, commit_with_effects
from celery_sharding.dedup.lease import Lease
from celery_sharding.dedup.results import ResultCodec
from celery_sharding.errors import DeduplicationError

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.orm import Session


class Claim:
    """The claim of the run that asks for it. Get it with `current_claim()`.

    Attributes:
        key: The dedup key, behind its scope.
        fencing: Greater than that of every earlier claim of this key, expired ones included. Pass it to systems that
            can refuse older ones.
        ttl_seconds: How long the result will be kept.
    """

    def __init__(
        self,
        *,
        fencing: int,
        lease: Lease,
        ttl_seconds: float,
        results: ResultCodec,
        outer: Claim | None,
    ) -> None:
        self.key = lease.key
        self.fencing = fencing
        self.ttl_seconds = ttl_seconds
        self.already_done: AlreadyDone | None = None
        self.has_committed_effects = False
        self._lease = lease
        self._results = results
        self._outer = outer
        self._has_begun = False

    @property
    def is_lost(self) -> bool:
        """True once another run is known to have taken over. Long tasks may check it, and stop."""
        return self._lease.is_lost

    def is_held_around(self, key: str) -> bool:
        """Say whether this claim, or one around it in the same call, is that of `key`."""
        return self.key == key or (self._outer is not None and self._outer.is_held_around(key))

    @contextmanager
    def transaction(
        self,
        session: Session | None = None,
        *,
        using: str | None = None,
        result: Any = None,
        table: Table | None = None,
    ) -> Iterator[Effects]:
        """Commit the claim with what the block writes through `session`, or in Django's database `using`: all or none.

        If another run has committed already, the block is not entered: the task ends and returns the stored result.
        Code before the block may run more than once, so keep all effects inside. One block per run.

        Args:
            session: A SQLAlchemy session of the user's database, preferably new. Committed at the end of the block,
                rolled back on an error.
            using: The alias of a database in Django's settings, instead of a session. By default "default".
            result: Stored with the effects for duplicates, in case this run dies before it returns. May also be
                assigned inside: `with claim.transaction(session) as effects: effects.result = …`.
            table: SQLAlchemy's claims table, if it is not called `celery_sharding_claims`; see `claims_table`.

        Raises:
            DeduplicationError: The table is missing, this is the second block, or the transaction was ended inside.
            ClaimLost: This run is stale.
        """
        if self._has_begun:
            raise DeduplicationError(
                f"claim.transaction() was entered twice in one run of {self.key!r}; what the second block writes could "
                "be lost after a crash between the two. Make it one block",
                key=self.key,
            )
        self._has_begun = True
        try:
            row = ClaimRow(self.key, self._lease.token, self.fencing, self.ttl_seconds)
            claims_table = _find_claims_table(row, session, using, table)
            with commit_with_effects(claims_table, row, result=result, results=self._results) as effects:
                yield effects
        except AlreadyDone as exc:
            self.already_done = exc  # In case the task swallows it.
            raise
        self.has_committed_effects = True


current: ContextVar[Claim | None] = ContextVar("celery_sharding_claim", default=None)


def current_claim() -> Claim:
    """Return the claim of the deduplicated task that runs here.

    Raises:
        DeduplicationError: The task is not deduplicated, or was called as a plain function.
    """
    claim = current.get()
    if claim is None:
        raise DeduplicationError(
            "no claim is held here: current_claim() works inside a task with @deduplicate that runs as a task (delay, "
            "apply_async, apply), not in a direct call and not in a thread that the task started"
        )
    return claim


def _find_claims_table(row: ClaimRow, session: Session | None, using: str | None, table: Table | None) -> ClaimsTable:
    if session is None:
        if table is not None:
            raise DeduplicationError("claim.transaction() takes table= with a SQLAlchemy session only")
        from celery_sharding.dedup.django_row import DjangoTable

        return DjangoTable(using or "default", row)
    if using is not None or isinstance(session, str):
        raise DeduplicationError(
            "claim.transaction() takes a SQLAlchemy session, or using= with the alias of a database of Django's"
        )
    from celery_sharding.dedup.sqlalchemy_row import SessionTable

    return SessionTable(session, row, table)
