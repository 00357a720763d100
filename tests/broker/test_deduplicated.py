"""`@deduplicate` on sharded tasks in real workers, with claims on Redis and effects in a database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from shops import Shop

from celery_sharding.testing.processes import wait_until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def shop(group_name: str, broker_url: str, redis_url: str, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(group_name, broker_url, tmp_path, app="payments", backend=redis_url)
    yield shop
    shop.kill_workers()


@pytest.mark.parametrize(
    "pool", [("-c", "4"), ("-c", "4", "-P", "threads"), ("-P", "solo")], ids=["prefork", "threads", "solo"]
)
def test_a_duplicate_gets_the_stored_result_and_does_not_run(shop: Shop, pool: tuple[str, ...]) -> None:
    # Given a worker
    shop.worker(*pool)
    # When one event is sent three times
    event = f"{shop.group}-1"
    results = [shop.send("once", "a", number, event=event) for number in range(3)]
    # Then it ran once, and each caller has its result
    assert {result.get(timeout=20) for result in results} == {f"{event} by 0"}
    assert shop.trace.count() == 1


def test_a_duplicate_in_another_shard_waits_for_the_run(shop: Shop) -> None:
    # Given an event that runs for a while under one key
    shop.worker()
    event = f"{shop.group}-1"
    first = shop.send("once", "a", 1, event=event, seconds=2)
    assert shop.trace.wait_for(1, kind="start")
    # When it is sent under other keys meanwhile
    others = [shop.send("once", key, 2, event=event) for key in ("b", "c")]
    # Then it ran once
    assert {result.get(timeout=20) for result in [first, *others]} == {f"{event} by 1"}
    assert shop.trace.count() == 1


def test_retries_in_place_keep_the_claim(shop: Shop) -> None:
    # Given a deduplicated task that retries twice
    shop.worker()
    event = f"{shop.group}-1"
    # When it is sent twice
    results = [shop.send("once_again", "a", number, event=event) for number in (1, 2)]
    # Then its body began three times, ended once, and both have the result
    assert [result.get(timeout=30) for result in results] == [2, 2]
    assert Counter(mark.kind for mark in shop.trace.read()) == {"begin": 3, "start": 1, "end": 1}


def test_effects_in_the_claims_transaction_happen_once_when_owners_are_killed(shop: Shop) -> None:
    # Given two workers, and every event sent twice
    shop.make_ledger()
    workers = [shop.worker("-c", "2"), shop.worker("-c", "2")]
    events = 120
    for number in range(events):
        for _ in range(2):
            shop.send("pay", f"k{number % 6}", number, event=f"{shop.group}-{number}")
    # When each worker is killed in the middle of its work, and started again
    for worker, count in zip(workers, (20, 60), strict=True):
        assert shop.trace.wait_for(count, timeout_seconds=40)
        worker.kill()
        worker.start()
    # Then each event has one row, in the order of its key
    assert wait_until(lambda: len(set(shop.paid())) >= events, timeout_seconds=60), shop.paid()
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    rows = shop.paid()
    assert sorted(rows) == list(range(events))
    for key in range(6):
        of_key = [number for number in rows if number % 6 == key]
        assert of_key == sorted(of_key)


def test_a_worker_without_a_store_for_claims_does_not_start(shop: Shop) -> None:
    # Given the same tasks without a result backend
    shop.env["SHOP_BACKEND"] = "rpc://"
    # When a worker starts, then it ends with an error that lists what serves
    with pytest.raises(Exception, match=r"(?s)NoUsableStore.*redis"):
        shop.worker()
