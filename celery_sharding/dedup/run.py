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
from datetime import datetime
from typing import Any

from celery.exceptions import Ignore, Reject, Retry

from celery_sharding.dedup.body import Body
from celery_sharding.dedup.claim_row import AlreadyDone
from celery_sharding.dedup.claims import Claimed, ClaimStore, Done, Running
from celery_sharding.dedup.lease import Lease, renewal
from celery_sharding.dedup.notices import COMMIT_REFUSED, DEDUPLICATED, STORE_ANSWERS, tell
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
    options = body.options
    key = body.record_key(task, request, args, kwargs)
    outer = current.get()
    if outer is not None and outer.is_held_around(key):
        raise ClaimHeld(f"the task that holds the claim {key!r} called itself with the same key", key=key)
    results = ResultCodec(task.app, key)
    if request.get(COMMIT):
        return _commit_again(task, request, key, options, results)
    store, outcome = _claim(task, request, key, options)
    if isinstance(outcome, Done):
        logger.debug("%s[%s] is a duplicate of a finished run of %s", task.name, request.id, key)
        tell(task, DEDUPLICATED)
        return results.decode(outcome.result)
    lease = Lease(store, key, outcome.token, options.lease_seconds)
    claim = Claim(fencing=outcome.fencing, lease=lease, ttl_seconds=options.ttl_seconds, results=results, outer=outer)
    try:
        _keep_alive(lease)
        return _run(body, args, kwargs, task=task, claim=claim, lease=lease, results=results)
    except ClaimLost as exc:
        tell(task, COMMIT_REFUSED)
        if lease.is_lost:
            _leave_to_same_task(task, lease, exc)
        raise
    finally:
        renewal.remove(lease)


def _commit_again(task: Any, request: Any, key: str, options: Options, results: ResultCodec) -> Any:
    """Commit what an earlier try has done, which found no store to commit to, and return its result."""
    data, has_effects = request.get(COMMIT)
    token = request.get(RUN_ID)
    try:
        store = store_for(task.app)
    except StoreUnavailable as exc:
        raise WaitInLane(STORE, _bounded(str(exc)), run_id=token, commit=(data, has_effects)) from None
    lease = Lease(store, key, token, options.lease_seconds)
    try:
        _commit(task, lease, data, options, has_effects=has_effects)
    except ClaimLost as exc:
        tell(task, COMMIT_REFUSED)
        _leave_to_same_task(task, lease, exc)
        raise
    return results.decode(data)


def _keep_alive(lease: Lease) -> None:
    try:
        renewal.add(lease)
    except BaseException:
        _give_up(lease)
        raise


def _run(
    body: Body,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    task: Any,
    claim: Claim,
    lease: Lease,
    results: ResultCodec,
) -> Any:
    options = body.options
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
        tell(task, DEDUPLICATED)
        # The effects are another run's, but they are this key's: the row is the authority.
        _commit(task, lease, data, options, has_effects=True)
        return results.decode(data)
    except Retry as exc:
        _give_up(lease, park_seconds=_wait_seconds(exc.when, task.app) + options.lease_seconds)
        raise
    except (Ignore, Reject):
        _give_up(lease)
        raise
    except Exception as exc:
        countdown_seconds = _autoretry_seconds(task, exc)
        if countdown_seconds is not None:
            _give_up(lease, park_seconds=countdown_seconds + options.lease_seconds)
        elif options.remember_failures:
            data = results.encode_failure(exc)
            _commit(task, lease, data, options, has_effects=claim.has_committed_effects)
        elif not _give_up(lease):
            _leave_to_same_task(task, lease, exc)
        raise
    except BaseException:
        _give_up(lease)
        raise
    _commit(task, lease, data, options, has_effects=claim.has_committed_effects)
    return value


def _claim(task: Any, request: Any, key: str, options: Options) -> tuple[ClaimStore, Claimed | Done]:
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
                tell(task, STORE_ANSWERS)
            if not isinstance(outcome, Running):
                return store, outcome
            if not outcome.parked and evict != outcome.token and is_provably_gone(outcome.owner):
                logger.warning("%s: its holder (pid %s) is gone; taking over", key, outcome.owner.pid)
                evict = outcome.token
                continue
            if options.on_running == "skip":
                raise Ignore(f"another run holds the claim {key}")
            if options.on_running == "retry":
                _retry_later(task, outcome)
            if may_wait_in_lane(request):
                raise WaitInLane(CLAIM, key, at_most_seconds=outcome.lease_left_seconds)
            if not is_logged:
                logger.debug("%s[%s] waits for the run that holds %s", task.name, request.id, key)
        is_logged = True
        time.sleep(next(pauses))


def _pauses() -> Iterator[float]:
    """Yield how long to wait before each next try: each time twice as long, at most a second."""
    seconds = POLL_SECONDS_MIN
    while True:
        yield seconds
        seconds = min(seconds * 2, POLL_SECONDS_MAX)


def _bounded(text: str) -> str:
    """Return the text of an error, cut to the length of a log line; a child sends it to its parent."""
    return text if len(text) <= _REASON_LENGTH_MAX else f"{text[:_REASON_LENGTH_MAX]}… (cut)"


def _retry_later(task: Any, holder: Running) -> None:
    # A waiting duplicate must not use up the retries of the task, and `retry` leaves the limit that it was given on
    # the task, where autoretry would find it.
    had_override = "override_max_retries" in vars(task)
    seconds = max(POLL_SECONDS_MIN, holder.lease_left_seconds)
    if may_wait_in_lane(task.request):
        # A retry in place may take half the consumer time-out; one that comes too early is repeated.
        seconds = min(seconds, task.app.sharding.settings.consumer_timeout_seconds / 4)
    try:
        raise task.retry(countdown=seconds, max_retries=(task.request.retries or 0) + 1)
    finally:
        if not had_override:
            vars(task).pop("override_max_retries", None)


def _commit(task: Any, lease: Lease, data: bytes, options: Options, *, has_effects: bool) -> None:
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
            if options.on_store_error == "wait" and may_wait_in_lane(task.request):
                raise WaitInLane(STORE, _bounded(str(exc)), run_id=lease.token, commit=(data, has_effects)) from None
            outages.warn("commit", "the commit of %s is tried again: %s", lease.key, exc)
        time.sleep(next(pauses))
    if task.request.get(ASKS_STORE):
        tell(task, STORE_ANSWERS)
    if is_done:
        return
    lease.is_lost = True
    if has_effects:
        logger.warning("%s was taken over after its effects were committed; they stand", lease.key)
        return
    logger.error("%s was taken over while its task ran; its commit was refused", lease.key)
    raise ClaimLost(
        f"the claim {lease.key!r} lapsed and was taken over; this run's result was refused. Raise lease_seconds above "
        f"the longest pause of a worker (now {options.lease_seconds} s)",
        key=lease.key,
    )


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


def _leave_to_same_task(task: Any, lease: Lease, error: Exception) -> None:
    """Raise `Ignore` if the run that took over has the same task id: that one stores the task's state."""
    try:
        shown = lease.store.show(lease.key)
    except DeduplicationError as exc:
        logger.warning("it is unknown which run took %s over: %s", lease.key, exc)
        return
    if shown is not None and shown.task_id == task.request.id:
        raise Ignore(f"another run of this task has taken over {lease.key}") from error


def _autoretry_seconds(task: Any, error: Exception) -> float | None:
    """Return the longest countdown with which Celery's autoretry will retry after `error`; None if it will not.

    `autoretry_for` acts around this wrapper (celery/app/autoretry.py), so its decision is predicted here.
    """
    if not hasattr(task, "_orig_run") or isinstance(error, tuple(getattr(task, "dont_autoretry_for", ()))):
        return None
    if not isinstance(error, tuple(getattr(task, "autoretry_for", ()))):
        return None
    options = getattr(task, "retry_kwargs", None) or {}
    limit = getattr(task, "override_max_retries", options.get("max_retries", task.max_retries))
    limit = task.max_retries if limit is None else limit
    retries = task.request.retries or 0
    if limit is not None and retries + 1 > limit:
        return None
    factor = float(getattr(task, "retry_backoff", False))
    if factor:
        return float(min(getattr(task, "retry_backoff_max", 600), max(1.0, factor) * 2 ** min(retries, 32)))
    countdown = options.get("countdown")
    return float(task.default_retry_delay if countdown is None else countdown)


def _wait_seconds(when: Any, app: Any) -> float:
    if isinstance(when, datetime):
        now = app.now() if when.tzinfo is not None else app.now().replace(tzinfo=None)
        return max(0.0, float((when - now).total_seconds()))
    return float(when or 0)
