"""One run of a deduplicated task: claim, run, then commit or give up.

    claimed ──▶ returns            commit, return          (refused: `ClaimLost`, unless its effects are committed)
            ──▶ refused, or fails, and a run of the same task id has taken over: ignored, the result is that run's
            ──▶ Retry              park for the same task id
            ──▶ Ignore, Reject     release
            ──▶ other error        release; park if Celery will retry it; commit if failures are remembered
            ──▶ AlreadyDone        commit and return what the row of `claim.transaction` holds
    running ──▶ wait, retry or skip; take over if the holder is provably gone
    done    ──▶ return the stored result
    silence ──▶ wait, or fail

Sharded runs wait in their lane, without a slot (`waiting`); others wait in their slot.

If the store does not answer when a claim is given up, the lease lapses by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from celery.exceptions import Ignore, Reject, Retry

from celery_sharding.dedup.body import Body
from celery_sharding.dedup.celery_retries import autoretry_seconds, retry_later, seconds_until
from celery_sharding.dedup.claim_row import AlreadyDone
from celery_sharding.dedup.claims import Claimed, ClaimStore, Done, Running
from celery_sharding.dedup.lease import Lease, renewal
from celery_sharding.dedup.notices import COMMIT_REFUSED, DEDUPLICATED, STORE_ANSWERS, notify_worker
from celery_sharding.dedup.options import Options
from celery_sharding.dedup.outage_log import OutageLog
from celery_sharding.dedup.owners import is_provably_gone, new_owner
from celery_sharding.dedup.results import ResultCodec
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.task_claim import Claim, current
from celery_sharding.dedup.waiting import CLAIM, STORE, WaitInLane, may_wait_in_lane
from celery_sharding.errors import ClaimHeld, ClaimLost, DeduplicationError, StoreUnavailable
from celery_sharding.wire import ASKS_STORE, COMMIT, RUN_ID

logger = logging.getLogger(__name__)
outages = OutageLog(logger)

POLL_SECONDS_MIN, POLL_SECONDS_MAX = 0.05, 1.0
_REASON_LENGTH_MAX = 500
COMMIT_PATIENCE_SECONDS = 5.0
"""How long a commit is repeated with `on_store_error="fail"`: a failed task would do its finished work again."""


def run_once(body: Body, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, task: Any, request: Any) -> Any:
    """Run `body` under the claim of its key, or return what an earlier run returned.

    Args:
        request: `task.request`, which takes Celery a look-up each time.

    Raises:
        ClaimLost: The claim was taken over; what `body` returned is not the task's result.
        ClaimHeld: The claim is held by a call around this one, which would wait for itself.
        StoreUnavailable: The store did not answer. `body` has not run, or its commit is unknown.
    """
    key = body.record_key(task, request, args, kwargs)
    outer = current.get()
    if outer is not None and outer.is_held_around(key):
        raise ClaimHeld(f"the task that holds the claim {key!r} called itself with the same key", key=key)
    run = _Run(task, request, key, body.options)
    if request.get(COMMIT):
        return run.commit_again()
    store, outcome = run.claim()
    if isinstance(outcome, Done):
        logger.debug("%s[%s] is a duplicate of a finished run of %s", task.name, request.id, key)
        notify_worker(task, DEDUPLICATED)
        return run.results.decode(outcome.result)
    lease = Lease(store, key, outcome.token, body.options.lease_seconds)
    ttl_seconds = body.options.ttl_seconds
    claim = Claim(fencing=outcome.fencing, lease=lease, ttl_seconds=ttl_seconds, results=run.results, outer=outer)
    try:
        _keep_alive(lease)
        return run.do(body, args, kwargs, claim=claim, lease=lease)
    except ClaimLost as exc:
        notify_worker(task, COMMIT_REFUSED)
        if lease.is_lost:
            run.leave_to_same_task(lease, exc)
        raise
    finally:
        renewal.remove(lease)


class _Run:
    __slots__ = ("key", "options", "request", "results", "task")

    def __init__(self, task: Any, request: Any, key: str, options: Options) -> None:
        self.task = task
        self.request = request
        self.key = key
        self.options = options
        self.results = ResultCodec(task.app, key)

    def claim(self) -> tuple[ClaimStore, Claimed | Done]:
        """Return the store, and the claim, or the result of the run that has finished."""
        task, request, key, options = self.task, self.request, self.key, self.options
        owner = new_owner(request.id, run_id=request.get(RUN_ID))
        evict: str | None = None
        pauses, is_logged = _pauses(), False
        while True:
            try:
                store = store_for(task.app, eager=bool(request.is_eager))
                outcome = store.claim(
                    key,
                    owner=owner,
                    lease_seconds=options.lease_seconds,
                    ttl_seconds=options.ttl_seconds,
                    evict=evict,
                )
            except StoreUnavailable as exc:
                if options.on_store_error == "fail":
                    raise
                if may_wait_in_lane(request):
                    raise WaitInLane(STORE, _bounded(str(exc)), run_id=owner.run_id) from None
                outages.warn("wait", "%s[%s] waits for the claim store: %s", task.name, request.id, exc)
            else:
                if request.get(ASKS_STORE):
                    notify_worker(task, STORE_ANSWERS)
                if not isinstance(outcome, Running):
                    return store, outcome
                if not outcome.parked and evict != outcome.token and is_provably_gone(outcome.owner):
                    logger.warning("%s: its holder (pid %s) is gone; taking over", key, outcome.owner.pid)
                    evict = outcome.token
                    continue
                if options.on_running == "skip":
                    raise Ignore(f"another run holds the claim {key}")
                if options.on_running == "retry":
                    retry_later(task, max(POLL_SECONDS_MIN, outcome.lease_left_seconds))
                if may_wait_in_lane(request):
                    raise WaitInLane(CLAIM, key, at_most_seconds=outcome.lease_left_seconds)
                if not is_logged:
                    logger.debug("%s[%s] waits for the run that holds %s", task.name, request.id, key)
            is_logged = True
            time.sleep(next(pauses))

    def do(self, body: Body, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, claim: Claim, lease: Lease) -> Any:
        """Run the body, and settle the claim by how it ends."""
        task, options, results = self.task, self.options, self.results
        entered = current.set(claim)
        try:
            try:
                value = body.function(*args, **kwargs)
            finally:
                current.reset(entered)
            if claim.already_done is not None:
                raise claim.already_done
            data = results.encode(value)
        except AlreadyDone as exc:
            data = exc.result if exc.result is not None else results.encode(None)
            notify_worker(task, DEDUPLICATED)
            # The effects are another run's, but they are this key's: the row is the authority.
            self.commit(lease, data, has_effects=True)
            return results.decode(data)
        except Retry as exc:
            _give_up(lease, park_seconds=seconds_until(exc.when, task.app) + options.lease_seconds)
            raise
        except (Ignore, Reject):
            _give_up(lease)
            raise
        except Exception as exc:
            countdown_seconds = autoretry_seconds(task, exc)
            if countdown_seconds is not None:
                _give_up(lease, park_seconds=countdown_seconds + options.lease_seconds)
            elif options.remember_failures:
                self.commit(lease, results.encode_failure(exc), has_effects=claim.has_committed_effects)
            elif not _give_up(lease):
                self.leave_to_same_task(lease, exc)
            raise
        except BaseException:
            _give_up(lease)
            raise
        self.commit(lease, data, has_effects=claim.has_committed_effects)
        return value

    def commit(self, lease: Lease, data: bytes, *, has_effects: bool) -> None:
        """Commit `data`; what was committed in the user's database (`has_effects`) stands even if it is refused.

        Raises:
            ClaimLost: It was refused, and there are no effects.
        """
        options = self.options
        lease.is_settling = True
        give_up_at = time.monotonic() + COMMIT_PATIENCE_SECONDS
        pauses = _pauses()
        while True:
            try:
                is_done = lease.store.commit(lease.key, lease.token, result=data, ttl_seconds=options.ttl_seconds)
                break
            except StoreUnavailable as exc:
                if options.on_store_error == "fail" and time.monotonic() >= give_up_at:
                    raise
                if options.on_store_error == "wait" and may_wait_in_lane(self.request):
                    raise self._wait_to_commit(exc, lease.token, data, has_effects) from None
                outages.warn("commit", "the commit of %s is tried again: %s", lease.key, exc)
            time.sleep(next(pauses))
        if self.request.get(ASKS_STORE):
            notify_worker(self.task, STORE_ANSWERS)
        if is_done:
            return
        lease.is_lost = True
        if has_effects:
            logger.warning("%s was taken over after its effects were committed; they stand", lease.key)
            return
        logger.error("%s was taken over while its task ran; its commit was refused", lease.key)
        raise ClaimLost(
            f"the claim {lease.key!r} lapsed and was taken over; this run's result was refused. Raise lease_seconds "
            f"above the longest pause of a worker (now {options.lease_seconds} s)",
            key=lease.key,
        )

    def commit_again(self) -> Any:
        """Commit what an earlier try has done, which found no store to commit to, and return its result."""
        data, has_effects = self.request.get(COMMIT)
        token = self.request.get(RUN_ID)
        try:
            store = store_for(self.task.app)
        except StoreUnavailable as exc:
            raise self._wait_to_commit(exc, token, data, has_effects) from None
        lease = Lease(store, self.key, token, self.options.lease_seconds)
        try:
            self.commit(lease, data, has_effects=has_effects)
        except ClaimLost as exc:
            notify_worker(self.task, COMMIT_REFUSED)
            self.leave_to_same_task(lease, exc)
            raise
        return self.results.decode(data)

    def leave_to_same_task(self, lease: Lease, error: Exception) -> None:
        """Raise `Ignore` if the run that took over has the same task id: that one stores the task's state."""
        try:
            shown = lease.store.show(lease.key)
        except DeduplicationError as exc:
            logger.warning("it is unknown which run took %s over: %s", lease.key, exc)
            return
        if shown is not None and shown.task_id == self.request.id:
            raise Ignore(f"another run of this task has taken over {lease.key}") from error

    def _wait_to_commit(self, error: Exception, token: str, data: bytes, has_effects: bool) -> WaitInLane:
        return WaitInLane(STORE, _bounded(str(error)), run_id=token, commit=(data, has_effects))


def _keep_alive(lease: Lease) -> None:
    try:
        renewal.add(lease)
    except BaseException:
        _give_up(lease)
        raise


def _give_up(lease: Lease, *, park_seconds: float | None = None) -> bool:
    """Release or park; False if the claim was another run's already."""
    lease.is_settling = True
    try:
        if park_seconds is None:
            return lease.store.release(lease.key, lease.token)
        return lease.store.park(lease.key, lease.token, lease_seconds=park_seconds)
    except StoreUnavailable as exc:
        outages.warn("release", "%s was not released, its lease will lapse: %s", lease.key, exc)
        return True


def _pauses() -> Iterator[float]:
    """Yield how long to wait before each next try: each time twice as long, at most a second."""
    seconds = POLL_SECONDS_MIN
    while True:
        yield seconds
        seconds = min(seconds * 2, POLL_SECONDS_MAX)


def _bounded(text: str) -> str:
    """Return the text of an error, cut to the length of a log line; a child sends it to its parent."""
    return text if len(text) <= _REASON_LENGTH_MAX else f"{text[:_REASON_LENGTH_MAX]}… (cut)"
