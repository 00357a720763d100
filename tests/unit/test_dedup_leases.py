"""Renewal of leases, and the proof that a holder is gone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from celery_sharding.dedup.claims import Claimed, Running
from celery_sharding.dedup.lease import Lease, Renewal
from celery_sharding.dedup.owners import Owner, is_provably_gone, new_owner
from celery_sharding.dedup.stores.memory import MemoryStore
from celery_sharding.errors import StoreUnavailable


class Clock:
    """A clock that goes when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Flaky(MemoryStore):
    """A store that does not answer while `is_down`."""

    is_down = False

    def renew(self, key: str, token: str, *, lease_seconds: float) -> bool:
        if self.is_down:
            raise StoreUnavailable("down", key=key)
        return super().renew(key, token, lease_seconds=lease_seconds)


def claim(store: MemoryStore, key: str, seconds: float = 60) -> Lease:
    outcome = store.claim(key, owner=new_owner("t"), lease_seconds=seconds, ttl_seconds=100)
    assert isinstance(outcome, Claimed)
    return Lease(store, key, outcome.token, seconds)


def is_free(store: MemoryStore, key: str) -> bool:
    return not isinstance(store.claim(key, owner=new_owner("x"), lease_seconds=60, ttl_seconds=100), Running)


def test_a_lease_is_renewed_after_a_third_of_it_and_not_before() -> None:
    # Given two leases, of 60 and of 600 seconds
    clock = Clock()
    store = MemoryStore(clock)
    short, long = claim(store, "short"), claim(store, "long", 600)
    now = max(short._renewed_at, long._renewed_at)
    assert not short.is_due(now)
    # When 21 seconds have passed
    assert short.is_due(now + 21)
    assert not long.is_due(now + 21)
    # Then the renewed one holds on from there
    clock.now += 21
    short.renew(now + 21)
    clock.now += 59
    assert not is_free(store, "short")
    assert not short.is_due(now + 40)


def test_a_store_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    # Given a store that is down when the lease is due
    store = Flaky(Clock())
    lease = claim(store, "a")
    renewal, now = Renewal(), lease._renewed_at
    renewal._leases[lease.token] = lease
    store.is_down = True
    renewal.renew_due(now + 21)
    # Then the lease is not lost, and due until the store answers
    assert not lease.is_lost
    assert "try again" in caplog.text
    assert lease.is_due(now + 22)
    store.is_down = False
    renewal.renew_due(now + 22)
    assert not lease.is_due(now + 23)


def test_a_lease_that_was_taken_over_is_known_as_lost(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    store = MemoryStore(clock)
    lease = claim(store, "a")
    clock.now += 61
    assert is_free(store, "a")
    lease.renew(lease._renewed_at + 61)
    assert lease.is_lost
    assert "taken over" in caplog.text
    assert not lease.is_due(lease._renewed_at + 100)


def test_a_lease_that_is_being_committed_is_left_alone() -> None:
    store = MemoryStore(Clock())
    lease = claim(store, "a")
    lease.is_settling = True
    store.commit("a", lease.token, result=b"1", ttl_seconds=9)
    lease.renew(lease._renewed_at + 30)
    assert not lease.is_lost
    assert not lease.is_due(lease._renewed_at + 30)


def test_a_running_process_renews_from_a_thread_of_its_own() -> None:
    # Given a store that tells when it is asked to renew
    renewed = threading.Event()
    names: list[str] = []

    class Telling(MemoryStore):
        def renew(self, key: str, token: str, *, lease_seconds: float) -> bool:
            names.append(threading.current_thread().name)
            renewed.set()
            return super().renew(key, token, lease_seconds=lease_seconds)

    store, renewal = Telling(), Renewal()
    # When a claim with a short lease joins one with a long lease
    slow = claim(store, "slow", 6_000)
    renewal.add(slow)
    lease = claim(store, "a", 0.3)
    renewal.add(lease)
    # Then the short one is renewed in time
    assert renewed.wait(60)
    renewal.remove(lease)
    renewal.remove(slow)
    assert set(names) == {"sharding-leases"}


def test_a_task_that_holds_the_interpreter_for_seconds_keeps_its_lease() -> None:
    # Given a lease of four seconds, and a C library that does not let go of the interpreter while it sleeps
    clock = Clock()
    library, store, renewal = ctypes.PyDLL(None), MemoryStore(clock), Renewal()
    lease = claim(store, "a", 4)
    renewal.add(lease)
    # When it is called again and again, for longer than the lease together
    for _ in range(5):
        library.usleep(1_200_000)
        clock.now += 1  # What a busy machine takes beyond the calls shall not count.
        # Then the claim is held at the end of each call
        assert not is_free(store, "a")
    renewal.remove(lease)


def test_a_thread_that_could_not_be_started_is_started_for_the_next_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    store, renewal = MemoryStore(), Renewal()
    first, second = (Lease(store, "k", token, 60) for token in ("t1", "t2"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _cannot_start)
        with pytest.raises(RuntimeError):
            renewal.add(first)
    renewal.remove(first)
    renewal.add(second)
    assert renewal._thread is not None
    assert renewal._thread.is_alive()


def _cannot_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_forked_child_renews_its_own_leases_only() -> None:
    program = """
import os
from celery_sharding.dedup.lease import Lease, renewal
from celery_sharding.dedup.stores.memory import MemoryStore
renewal.add(Lease(MemoryStore(), "a", "token", 60))
parent = renewal._thread
pid = os.fork()
if pid == 0:
    fresh = renewal._leases == {} and renewal._thread is None
    renewal.add(Lease(MemoryStore(), "b", "token", 60))
    os._exit(0 if fresh and renewal._thread.is_alive() and renewal._thread is not parent else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_this_process_is_not_gone() -> None:
    assert not is_provably_gone(new_owner("t"))


def test_a_process_that_ended_is_gone() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert is_provably_gone(replace(new_owner("t"), pid=ended.pid))


def test_another_process_with_the_same_pid_proves_that_the_holder_is_gone() -> None:
    assert is_provably_gone(replace(new_owner("t"), pid_started="1"))


@pytest.mark.parametrize("field", ["host", "boot_id", "pid_namespace"])
@pytest.mark.parametrize("value", ["another", ""])
def test_a_process_that_cannot_be_seen_from_here_is_not_provably_gone(field: str, value: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not is_provably_gone(replace(new_owner("t"), pid=ended.pid, **{field: value}))


def test_an_owner_reads_back_what_it_wrote_and_refuses_the_rest() -> None:
    owner = new_owner("t")
    assert owner.pid == os.getpid()
    assert Owner.from_text(owner.to_text()) == owner
    for text in ("", "[]", "{}", '{"pid": 1}'):
        with pytest.raises(ValueError):  # noqa: PT011  # JSON's errors are of it, with texts of their own
            Owner.from_text(text)
