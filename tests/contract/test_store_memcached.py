"""What claim stores in Memcached promise beyond what every store does."""

from __future__ import annotations

import uuid

import pymemcache
import pytest

from celery_sharding import ShardGroup, Sharding, deduplicate
from celery_sharding.cli.doctor_app import examine_app
from celery_sharding.dedup.claims import Claimed, Done
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import check_tasks, store_for
from celery_sharding.dedup.stores.memcached import MemcachedStore
from celery_sharding.errors import DeduplicationError, StoreUnavailable
from support.claiming_process import app_for
from support.store_servers import Memcached

pytestmark = pytest.mark.xdist_group("redis")


@pytest.fixture
def key() -> str:
    return f"tests:{uuid.uuid4().hex}"


@pytest.mark.parametrize("ttl_seconds", [100, 40 * 86_400])
def test_memcached_records_expire_by_themselves(memcached: Memcached, key: str, ttl_seconds: int) -> None:
    store = _store(memcached)
    store.commit(key, _claim(store, key).token, result=b"1", ttl_seconds=ttl_seconds)
    client = pymemcache.Client(memcached.address)
    left = client.raw_command(f"mg {store.name_of(key)} t".encode())
    client.close()
    assert ttl_seconds - 5 <= int(left.removeprefix(b"HD t")) <= ttl_seconds + 3


def test_a_result_too_large_for_an_item_is_an_error_that_names_it(memcached: Memcached, key: str) -> None:
    store = _store(memcached)
    first = _claim(store, key)
    with pytest.raises(DeduplicationError, match="too large for an item") as caught:
        store.commit(key, first.token, result=b"x" * 1024 * 1024, ttl_seconds=60)
    assert caught.value.key == key
    # And the claim is still held
    assert store.commit(key, first.token, result=b"1", ttl_seconds=60)


def test_a_worker_and_the_doctor_say_that_it_is_best_effort(
    memcached: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_for(memcached.url)
    app.conf.broker_url = "amqp://"
    sharding = Sharding(app, groups=[ShardGroup("orders", 2)])

    @app.task(shared=False, name="shop.pay")
    @deduplicate()
    def pay() -> None: ...

    check_tasks(app)
    assert "@deduplicate of shop.pay is limited: Memcached forgets" in caplog.text
    warnings = [each.text for each in examine_app(sharding) if (each.check, each.severity) == ("claims", "warning")]
    assert len(warnings) == 1
    assert "Memcached forgets" in warnings[0]


def test_a_memcached_that_was_restarted_is_empty_and_costs_nothing_else(key: str) -> None:
    with Memcached() as server:
        # Given a claim, and several connections to a Memcached that restarts
        store = _store(server)
        first = _claim(store, key)
        pool = store.servers[server.address].client.client_pool
        with pool.get_and_release() as one, pool.get_and_release() as other:
            assert one.version() == other.version()
        server.kill()
        server.start()
        # When claims are made again, then they are as new, under a higher fencing token
        second = _claim(store, key)
        assert second.fencing > first.fencing
        assert not store.commit(key, first.token, result=b"1", ttl_seconds=60)
        assert store.commit(key, second.token, result=b"2", ttl_seconds=60)


def test_the_claims_of_a_lost_server_are_unavailable_and_not_made_elsewhere() -> None:
    with Memcached() as one, Memcached() as other:
        # Given claims on two servers
        store = store_for(app_for(f"cache+memcached://{one.address};{other.address}/"))
        results = {}
        for number in range(20):
            name = f"key {number}"
            results[name] = f"{number}".encode()
            assert store.commit(name, _claim(store, name).token, result=results[name], ttl_seconds=60)
        # When one is killed
        other.kill()
        # Then its claims, and only they, are refused
        lost = []
        for name, result in results.items():
            try:
                outcome = store.claim(name, owner=new_owner("t"), lease_seconds=60, ttl_seconds=60)
                assert outcome == Done(result)
            except StoreUnavailable as exc:
                lost.append((name, exc.key))
        assert 0 < len(lost) < 20
        # By an error that names them
        assert [name for name, _ in lost] == [key for _, key in lost]


def test_a_memcached_told_not_to_forget_refuses_new_claims_when_it_is_full(key: str) -> None:
    # Given a Memcached of 2 MB with -M, full of results
    with Memcached("-M", "-m", "2") as server:
        store = _store(server)
        done: list[str] = []
        with pytest.raises(StoreUnavailable, match="out of memory"):
            _fill(store, key, done)
        # Then what was committed is kept
        assert done
        for name in done:
            assert isinstance(store.claim(name, owner=new_owner("t"), lease_seconds=60, ttl_seconds=60), Done)


def _fill(store: MemcachedStore, key: str, done: list[str]) -> None:
    for number in range(100):
        name = f"{key}.{number}"
        assert store.commit(name, _claim(store, name).token, result=b"x" * 300_000, ttl_seconds=60)
        done.append(name)


def _store(server: Memcached) -> MemcachedStore:
    store = store_for(app_for(server.url))
    assert isinstance(store, MemcachedStore)
    return store


def _claim(store: object, key: str) -> Claimed:
    outcome = store.claim(key, owner=new_owner("t"), lease_seconds=60, ttl_seconds=60)  # type: ignore[attr-defined]
    assert isinstance(outcome, Claimed)
    return outcome
