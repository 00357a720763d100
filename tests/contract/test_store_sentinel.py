"""What claims behind Redis Sentinel go through."""

from __future__ import annotations

import pytest
import redis

from celery_sharding.dedup.claims import Claimed, Done
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for
from celery_sharding.errors import StoreUnavailable
from celery_sharding.testing.processes import wait_until
from support.claiming_process import app_for
from support.store_servers import Sentinel

pytestmark = pytest.mark.xdist_group("redis")


def test_claims_go_on_after_a_failover() -> None:
    with Sentinel() as sentinel:
        # Given a finished claim and a running one, which the replica has
        store = store_for(app_for(sentinel.backend))
        store.commit("done", _claim(store, "done").token, result=b"1", ttl_seconds=600)
        first = _claim(store, "running")
        with redis.Redis.from_url(sentinel.primary.url) as client:
            assert wait_until(lambda: _is_replicated(client.info("replication")), timeout_seconds=30)
        # When the primary dies
        sentinel.primary.kill()

        def is_renewed() -> bool:
            try:
                return store.renew("running", first.token, lease_seconds=60)
            except StoreUnavailable:
                return False

        # Then the claims are served by the other, as they were
        assert wait_until(is_renewed, timeout_seconds=60)
        assert store.commit("running", first.token, result=b"2", ttl_seconds=600)
        assert _outcome(store, "done") == Done(b"1")
        assert _outcome(store, "running") == Done(b"2")
        with redis.Redis.from_url(sentinel.replica.url) as client:
            assert client.info("replication")["role"] == "master"


def _is_replicated(info: dict[str, object]) -> bool:
    replica = info.get("slave0")
    return isinstance(replica, dict) and replica["offset"] == info["master_repl_offset"]


def _outcome(store: object, key: str) -> object:
    return store.claim(key, owner=new_owner("t"), lease_seconds=600, ttl_seconds=600)  # type: ignore[attr-defined]


def _claim(store: object, key: str) -> Claimed:
    outcome = _outcome(store, key)
    assert isinstance(outcome, Claimed)
    return outcome
