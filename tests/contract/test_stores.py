"""What every claim store promises, tried on each of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from celery import Celery

from celery_sharding.dedup.claims import DONE, PARKED, RELEASED, RUNNING, Claimed, ClaimStore, Done, Running
from celery_sharding.dedup.owners import Owner, is_provably_gone, new_owner
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.stores.database import DatabaseStore, open_engine
from celery_sharding.errors import DamagedRecord, StoreUnavailable
from support.paths import ROOT, TESTS, python_path
from support.store_places import LEASE, TTL, Place


@pytest.fixture
def store(place: Place) -> ClaimStore:
    return place.store


@pytest.fixture
def key() -> str:
    return f"tests:{uuid.uuid4().hex}"


def claim(
    store: ClaimStore, key: str, owner: Owner | None = None, *, evict: str | None = None
) -> Claimed | Running | Done:
    return store.claim(key, owner=owner or new_owner("task-1"), lease_seconds=LEASE, ttl_seconds=TTL, evict=evict)


def claimed(store: ClaimStore, key: str, owner: Owner | None = None, *, evict: str | None = None) -> Claimed:
    outcome = claim(store, key, owner, evict=evict)
    assert isinstance(outcome, Claimed), outcome
    return outcome


def test_a_running_claim_keeps_others_out_and_says_who_holds_it(store: ClaimStore, key: str) -> None:
    # Given a claim
    owner = new_owner("task-1")
    first = claimed(store, key, owner)
    # When another run asks
    second = claim(store, key)
    # Then it is told who runs, and for how long the lease holds
    assert isinstance(second, Running)
    assert (second.token, second.owner, second.parked) == (first.token, owner, False)
    assert 0 < second.lease_left_seconds <= LEASE


def test_other_keys_are_free(store: ClaimStore, key: str) -> None:
    claimed(store, key)
    claimed(store, f"{key}.other")
    claimed(store, key.upper() if key != key.upper() else key.lower())


def test_a_key_is_any_text(store: ClaimStore, key: str) -> None:
    for name in (f"{key}:a b:{{c}}:'é\"\n漢", f"{key}:%s", f"{key}:{'x' * 500}", f"{key}:\0\x7f"):
        first = claimed(store, name)
        assert isinstance(claim(store, name), Running)
        assert store.commit(name, first.token, result=b"r", ttl_seconds=TTL)
        assert claim(store, name) == Done(b"r")


def test_a_committed_result_is_returned_to_every_later_claim(store: ClaimStore, key: str) -> None:
    # Given a finished run with bytes that are no text
    result = b"\x00\xff\n" + bytes(range(256)) * 20
    first = claimed(store, key)
    assert store.commit(key, first.token, result=result, ttl_seconds=TTL)
    # When others ask, then they get the result
    assert claim(store, key) == Done(result)
    assert claim(store, key) == Done(result)


def test_a_released_claim_is_free_at_once(store: ClaimStore, key: str) -> None:
    first = claimed(store, key)
    assert store.release(key, first.token)
    assert claimed(store, key).fencing > first.fencing


def test_a_claim_whose_answer_was_lost_may_be_asked_for_again(store: ClaimStore, key: str) -> None:
    # Given a run that got its claim but not the answer
    owner = new_owner("task-1")
    first = claimed(store, key, owner)
    # When it asks again, then the claim is the same
    assert claimed(store, key, owner) == first
    # And a commit may be sent twice
    assert store.commit(key, first.token, result=b"1", ttl_seconds=TTL)
    assert store.commit(key, first.token, result=b"1", ttl_seconds=TTL)
    assert claim(store, key) == Done(b"1")


def test_a_lapsed_claim_is_taken_over_and_its_holder_can_change_nothing(place: Place, key: str) -> None:
    # Given a holder whose lease has lapsed
    store = place.store
    stale = claimed(store, key)
    place.pass_time(key, LEASE + 1)
    # When another run claims
    taker = claimed(store, key)
    # Then the old holder is refused everything
    assert taker.fencing > stale.fencing
    assert not store.commit(key, stale.token, result=b"stale", ttl_seconds=TTL)
    assert not store.renew(key, stale.token, lease_seconds=LEASE)
    assert not store.park(key, stale.token, lease_seconds=LEASE)
    assert not store.release(key, stale.token)
    # And the new one goes on
    assert store.commit(key, taker.token, result=b"fresh", ttl_seconds=TTL)
    assert not store.commit(key, stale.token, result=b"stale", ttl_seconds=TTL)
    assert claim(store, key) == Done(b"fresh")


def test_a_renewed_claim_does_not_lapse(place: Place, key: str) -> None:
    store = place.store
    first = claimed(store, key)
    for _ in range(3):
        place.pass_time(key, LEASE * 0.9)
        assert store.renew(key, first.token, lease_seconds=LEASE)
    assert isinstance(claim(store, key), Running)


def test_a_claim_that_is_renewed_outlives_its_time_to_live(place: Place, key: str) -> None:
    store = place.store
    first = store.claim(key, owner=new_owner("task-1"), lease_seconds=LEASE, ttl_seconds=LEASE)
    assert isinstance(first, Claimed)
    for _ in range(5):
        place.pass_time(key, LEASE * 0.9)
        assert store.renew(key, first.token, lease_seconds=LEASE)
    shown = store.show(key)
    assert shown is not None
    assert LEASE * 1.9 < shown.expires_in_seconds <= LEASE * 2
    assert isinstance(claim(store, key), Running)


def test_a_lapsed_claim_that_nobody_took_is_still_its_holders(place: Place, key: str) -> None:
    store = place.store
    first = claimed(store, key)
    place.pass_time(key, LEASE * 2)
    assert store.renew(key, first.token, lease_seconds=LEASE)
    assert isinstance(claim(store, key), Running)
    assert store.commit(key, first.token, result=b"1", ttl_seconds=TTL)


def test_a_parked_claim_waits_for_its_own_task(store: ClaimStore, key: str) -> None:
    # Given a run that will be retried
    first = claimed(store, key, new_owner("task-1"))
    assert store.park(key, first.token, lease_seconds=LEASE)
    # When another task asks, then it has to wait
    other = claim(store, key, new_owner("task-2"))
    assert isinstance(other, Running)
    assert other.parked
    # And the retry of the same task goes on
    retry = claimed(store, key, new_owner("task-1"))
    assert retry.fencing > first.fencing
    assert store.commit(key, retry.token, result=b"1", ttl_seconds=TTL)


def test_a_second_message_of_a_running_task_is_kept_out(store: ClaimStore, key: str) -> None:
    claimed(store, key, new_owner("task-1"))
    assert isinstance(claim(store, key, new_owner("task-1")), Running)


def test_a_parked_claim_lapses_too(place: Place, key: str) -> None:
    first = claimed(place.store, key, new_owner("task-1"))
    assert place.store.park(key, first.token, lease_seconds=LEASE)
    place.pass_time(key, LEASE + 1)
    claimed(place.store, key, new_owner("task-2"))


def test_a_holder_that_is_gone_is_evicted_by_its_token_only(store: ClaimStore, key: str) -> None:
    first = claimed(store, key)
    assert isinstance(claim(store, key, evict="another token"), Running)
    second = claimed(store, key, evict=first.token)
    assert second.fencing > first.fencing
    assert isinstance(claim(store, key, evict=first.token), Running)


def test_a_finished_claim_cannot_be_evicted(store: ClaimStore, key: str) -> None:
    first = claimed(store, key)
    store.commit(key, first.token, result=b"1", ttl_seconds=TTL)
    assert claim(store, key, evict=first.token) == Done(b"1")


def test_a_result_is_forgotten_after_its_time_to_live_and_fencing_goes_on_rising(place: Place, key: str) -> None:
    # Given a result in its last second
    store = place.store
    first = claimed(store, key)
    store.commit(key, first.token, result=b"1", ttl_seconds=TTL)
    place.pass_time(key, TTL - 60)
    assert claim(store, key) == Done(b"1")
    # When its time is over
    place.pass_time(key, 61)
    # Then the work may be done again, under a higher fencing token
    assert store.show(key) is None
    assert claimed(store, key).fencing > first.fencing


def test_fencing_rises_through_every_kind_of_end(place: Place, key: str) -> None:
    store, seen = place.store, [0]
    for end in ("release", "lapse", "evict", "park", "release"):
        last = claimed(store, key)
        assert last.fencing > seen[-1]
        seen.append(last.fencing)
        if end == "release":
            store.release(key, last.token)
        elif end == "lapse":
            place.pass_time(key, LEASE + 1)
        elif end == "park":
            store.park(key, last.token, lease_seconds=LEASE)
        else:
            seen.append(claimed(store, key, evict=last.token).fencing)
            place.pass_time(key, LEASE + 1)


def test_show_tells_the_state_and_changes_nothing(place: Place, key: str) -> None:
    # Given no record, then nothing is shown
    store = place.store
    assert store.show(key) is None
    # Given a run
    owner = new_owner("task-1")
    first = claimed(store, key, owner)
    shown = store.show(key)
    assert shown is not None
    assert (shown.state, shown.owner, shown.fencing, shown.attempts) == (RUNNING, owner, first.fencing, 1)
    assert shown.lease_left_seconds is not None
    assert 0 < shown.lease_left_seconds <= LEASE
    # Given a parked one, a released one, and a finished one
    store.park(key, first.token, lease_seconds=LEASE)
    assert getattr(store.show(key), "state", None) == PARKED
    store.release(key, first.token)
    assert getattr(store.show(key), "state", None) == RELEASED
    store.commit(key, claimed(store, key).token, result=b"12345", ttl_seconds=TTL)
    shown = store.show(key)
    assert shown is not None
    assert (shown.state, shown.owner, shown.attempts, shown.result_bytes) == (DONE, None, 2, 5)
    assert shown.task_id == "task-1"
    assert TTL - 60 < shown.expires_in_seconds <= TTL


def test_what_is_done_is_forgotten_and_the_fencing_token_is_not(store: ClaimStore, key: str) -> None:
    # Given a finished run
    first = claimed(store, key)
    store.commit(key, first.token, result=b"1", ttl_seconds=TTL)
    # When it is forgotten, then the work may be done again, under a higher fencing token
    assert store.forget(key, force=False)
    assert getattr(store.show(key), "state", None) == RELEASED
    assert claimed(store, key).fencing > first.fencing
    # And where nothing is known, there is nothing to forget
    assert store.forget(f"{key}.other", force=False)
    assert store.show(f"{key}.other") is None


@pytest.mark.parametrize("state", [RUNNING, PARKED])
def test_what_is_held_is_forgotten_by_force_only_and_its_commit_refused(
    store: ClaimStore, key: str, state: str
) -> None:
    # Given a run, or one that waits for its retry
    first = claimed(store, key)
    if state == PARKED:
        store.park(key, first.token, lease_seconds=LEASE)
    # When it is to be forgotten, then it stays,
    assert not store.forget(key, force=False)
    assert getattr(store.show(key), "state", None) == state
    # and by force it does not
    assert store.forget(key, force=True)
    assert not store.commit(key, first.token, result=b"1", ttl_seconds=TTL)
    assert claimed(store, key).fencing > first.fencing


def test_a_lapsed_claim_may_be_forgotten(place: Place, key: str) -> None:
    first = claimed(place.store, key)
    place.pass_time(key, LEASE + 1)
    assert place.store.forget(key, force=False)
    assert not place.store.commit(key, first.token, result=b"1", ttl_seconds=TTL)


def test_a_record_that_cannot_be_read_is_deleted_by_force_only(shared: Place, key: str) -> None:
    claimed(shared.store, key)
    shared.set_version(key, 2)
    with pytest.raises(DamagedRecord):
        shared.store.forget(key, force=False)
    assert shared.store.forget(key, force=True)
    assert shared.store.show(key) is None


def test_one_of_eight_threads_gets_the_claim(store: ClaimStore, key: str) -> None:
    # Given eight threads that start together
    gate, won, lock = threading.Barrier(8), [], threading.Lock()

    def race() -> None:
        for number in range(20):
            gate.wait(60)
            outcome = claim(store, f"{key}.{number}")
            if isinstance(outcome, Claimed):
                with lock:
                    won.append(number)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    # Then each key was claimed once
    assert won == list(range(20))


def test_one_of_four_processes_gets_the_claim_and_its_commit(shared: Place, key: str) -> None:
    # Given four processes that start together
    with claiming(shared.url, "race", key, "40", "4") as process:
        lines = process.communicate("go\n", timeout=120)[0].splitlines()
        assert process.returncode == 0
    # Then each key was claimed and committed once
    assert not [line for line in lines if line.startswith("refused")]
    assert sorted(line.split()[0] for line in lines) == sorted(f"{key}.{number}" for number in range(40))


def test_a_holder_killed_with_sigkill_is_taken_over_at_once(shared: Place, key: str) -> None:
    # Given another process that holds the claim for ten minutes
    with claiming(shared.url, "hold", key) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        token, fencing = process.stdout.readline().split()[1:]
        holder = claim(shared.store, key)
        assert isinstance(holder, Running)
        assert not is_provably_gone(holder.owner)
        # When it is killed, and nobody has waited for it yet
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # Then it is provably gone
        assert is_provably_gone(holder.owner)
    assert is_provably_gone(holder.owner)
    # And its claim is taken over without waiting for the lease
    taker = claimed(shared.store, key, evict=holder.token)
    assert holder.token == token
    assert taker.fencing > int(fencing)


def test_a_record_of_a_newer_version_is_refused_and_kept(shared: Place, key: str) -> None:
    # Given a record that a newer version wrote
    first = claimed(shared.store, key)
    shared.store.commit(key, first.token, result=b"1", ttl_seconds=TTL)
    shared.set_version(key, 2)
    # When it is claimed, then the error names the key
    with pytest.raises(DamagedRecord) as caught:
        claim(shared.store, key)
    assert caught.value.key == key
    with pytest.raises(DamagedRecord):
        shared.store.show(key)
    # And the record is as it was
    shared.set_version(key, 1)
    assert claim(shared.store, key) == Done(b"1")


def test_a_redis_that_does_not_answer_is_unavailable(key: str) -> None:
    store = store_for(Celery(backend="redis://127.0.0.1:1/0", set_as_current=False))
    with pytest.raises(StoreUnavailable) as caught:
        claim(store, key)
    assert caught.value.key == key


def test_a_database_that_does_not_answer_is_unavailable(key: str) -> None:
    store = DatabaseStore(open_engine("sqlite:////nowhere/at/all.sqlite", {}))
    with pytest.raises(StoreUnavailable) as caught:
        claim(store, key)
    assert caught.value.key == key


def test_redis_scripts_survive_a_flush_of_the_script_cache(redis_url: str, key: str) -> None:
    store = store_for(Celery(backend=redis_url, set_as_current=False))
    first = claimed(store, key)
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    assert store.commit(key, first.token, result=b"1", ttl_seconds=TTL)


def test_a_connection_that_redis_has_closed_costs_nothing(redis_url: str, key: str) -> None:
    # Given a claim, in a database that no other test uses
    store = store_for(Celery(backend=f"{redis_url.rpartition('/')[0]}/9", set_as_current=False))
    first = claimed(store, key)
    # When the server closes its connections
    with redis.Redis.from_url(redis_url) as client:
        for other in client.client_list():
            if other["db"] == "9":
                client.client_kill_filter(_id=other["id"])
    # Then its commit does not notice
    assert store.commit(key, first.token, result=b"1", ttl_seconds=TTL)


def test_an_interrupted_claim_leaves_no_answer_for_the_next_one(redis_url: str, key: str) -> None:
    class TimeLimit(Exception):
        """What a soft time limit raises, wherever the task is."""

    def interrupt(number: int, frame: object) -> None:
        raise TimeLimit

    store = store_for(Celery(backend=redis_url, set_as_current=False))
    first = claimed(store, key)
    assert store.commit(key, first.token, result=b"of the first key", ttl_seconds=TTL)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        # Given a server that answers late, and a claim that a time limit interrupts meanwhile
        with redis.Redis.from_url(redis_url) as client:
            client.client_pause(400)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(TimeLimit):
            claim(store, key)
    finally:
        signal.signal(signal.SIGALRM, previous)
    # When another key is claimed
    other = claim(store, f"{key}-other")
    # Then the answer is that key's, not the late one
    assert isinstance(other, Claimed), other


def test_redis_records_expire_by_themselves(redis_url: str, key: str) -> None:
    store = store_for(Celery(backend=redis_url, set_as_current=False))
    with redis.Redis.from_url(redis_url) as client:
        name = f"celery-sharding:dedup:{key}"
        first = claimed(store, key)
        assert TTL * 1_000 < client.pttl(name) <= (TTL + LEASE) * 1_000
        store.commit(key, first.token, result=b"1", ttl_seconds=7)
        assert 0 < client.pttl(name) <= 7_000


def test_where_records_expire_by_themselves_nothing_is_purged(redis_url: str, key: str) -> None:
    store = store_for(Celery(backend=redis_url, set_as_current=False))
    claimed(store, key)
    assert store.purge() == 0


@contextmanager
def claiming(url: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run of `claiming_process.py` that is ready; ended and waited for afterwards."""
    command = [sys.executable, "-m", "support.claiming_process", url, *arguments]
    env = os.environ | {"PYTHONPATH": python_path(TESTS, ROOT)}
    process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
