"""`@deduplicate` on sharded tasks in real workers, with claims on Redis and effects in a database."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord
from kombu import Connection

from celery_sharding.dedup.stores import store_for
from celery_sharding.errors import ClaimLost
from celery_sharding.rabbitmq.streams import read_backwards
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def shop(group_name: str, broker_url: str, redis_url: str, tmp_path: Path) -> Iterator[Shop]:
    with Shop(group_name, broker_url, tmp_path, app="payments", backend=redis_url) as shop:
        yield shop


@pytest.mark.parametrize("pool", pools("prefork", "threads", slow=("solo",)))
def test_a_duplicate_gets_the_stored_result_and_does_not_run(shop: Shop, pool: str) -> None:
    # Given a worker
    shop.worker(*pool_options(pool))
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


@pytest.mark.parametrize("pool", pools("prefork", "gevent", slow=("threads", "solo")))
def test_duplicates_that_wait_for_a_claim_leave_the_only_slot_to_others(shop: Shop, pool: str) -> None:
    # Given a worker with one slot, and an event whose run is parked for its retry
    shop.worker(*pool_options(pool, 1))
    event = f"{shop.group}-1"
    first = shop.send("twice", "a", 0, event=event)
    assert shop.trace.wait_for(1, kind="begin")
    # When duplicates of it come on its own key and on others, and an innocent message
    copies = [shop.send("twice", key, 1, event=event) for key in ("a", *(f"k{number}" for number in range(20)))]
    innocent = shop.send("once", "z", 2, event=f"{shop.group}-2")
    # Then the innocent runs, the retry ends the claim, and all have its result
    assert innocent.get(timeout=60) == f"{shop.group}-2 by 2"
    assert {result.get(timeout=60) for result in [first, *copies]} == {f"{event} by 0"}
    assert Counter(mark.kind for mark in shop.trace.read() if mark.key == "a") == {"begin": 2, "start": 1, "end": 1}


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


def test_link_chain_and_chord_go_on_behind_a_duplicate(shop: Shop) -> None:
    # Given an event that is done
    shop.worker()
    event = f"{shop.group}-1"
    first = shop.send("once", "a", 1, event=event).get(timeout=20)
    # When duplicates of it come with a link, in a chain, and in the header of a chord
    again = shop.app.signature("payments.once", kwargs={"key": "a", "number": 2, "event": event})
    after, after_all = shop.app.signature("plain.after"), shop.app.signature("plain.after_all")
    linked = after.clone().set(task_id=f"{shop.group}-linked")
    duplicate = again.clone().apply_async(link=linked)
    chained = (again | after).apply_async()
    joined = chord([again.clone(), again.clone()], after_all, app=shop.app).apply_async()
    # Then what follows gets the stored result
    assert shop.app.AsyncResult(f"{shop.group}-linked").get(timeout=20) == f"after {first}"
    assert chained.get(timeout=20) == f"after {first}"
    assert joined.get(timeout=20) == f"after {first} and {first}"
    assert (duplicate.get(timeout=20), duplicate.state) == (first, "SUCCESS")
    assert shop.trace.count() == 1


@pytest.mark.parametrize("task", ["early", "late", "ignored"])
def test_tasks_that_are_not_sharded_are_deduplicated_in_any_ack_mode(shop: Shop, task: str) -> None:
    # Given a worker of the ordinary queue
    shop.worker("-c", "2")
    event = f"{shop.group}-1"
    # When an event is sent three times, and another behind them
    results = [
        shop.app.send_task(f"plain.{task}", (each, number), queue=f"{shop.group}-plain")
        for number, each in enumerate([event, event, event, f"{event}-other"])
    ]
    # Then each ran once, also where the result is kept by the claim alone
    assert shop.trace.wait_for(2)
    if task == "ignored":
        shown = f"plain.ignored:{event}"
        assert wait_until(lambda: getattr(store_for(shop.app).show(shown), "result_bytes", None), timeout_seconds=20)
        shop.app.send_task("plain.ignored", (event, 9), queue=f"{shop.group}-plain")
        shop.app.send_task("plain.late", (f"{event}-last", 10), queue=f"{shop.group}-plain").get(timeout=20)
        assert shop.trace.count() == 3
    else:
        assert len({result.get(timeout=20) for result in results[:3]}) == 1
        assert shop.trace.count() == 2


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads",)))
def test_a_duplicate_comes_again_though_the_claim_is_parked_for_longer_than_a_retry_may_take(
    shop: Shop, pool: str
) -> None:
    # Given an event whose claim is parked for minutes, where a retry may take six seconds
    shop.worker("-c", "2", "-P", pool, SHOP_CONSUMER_TIMEOUT="12")
    event = f"{shop.group}-1"
    first = shop.send("coming_again", "a", 1, event=event)
    assert shop.trace.wait_for(1, kind="parked")
    # When it comes under another key
    second = shop.send("coming_again", "b", 2, event=event)
    # Then it comes again until it finds the result of the first
    assert first.get(timeout=60) == second.get(timeout=60) == f"{event} by 1"
    assert shop.trace.count() == 1


def test_a_skipped_duplicate_writes_no_state_over_that_of_the_run(shop: Shop) -> None:
    # Given an event that runs for a while
    shop.env["SHOP_SETTINGS"] = '{"task_track_started": true}'
    shop.worker("-c", "4")
    event, same = f"{shop.group}-1", f"{shop.group}-id"
    first = shop.send("skipping", "a", 1, event=event, seconds=3, task_id=same)
    assert shop.trace.wait_for(1, kind="start")
    # When it is sent under other keys, one of them under the task id of the run
    other = shop.send("skipping", "b", 2, event=event)
    shop.send("skipping", "c", 3, event=event, task_id=same)
    assert wait_until(lambda: logged(shop, "ignored") >= 2, timeout_seconds=20)
    # Then they are gone without a result, and the state is that of the run
    assert first.state == "STARTED"
    assert first.get(timeout=20) == f"{event} by 1"
    assert wait_until(shop.has_nothing_left, timeout_seconds=20)
    assert first.state == "SUCCESS"
    assert other.state in ("PENDING", "STARTED")
    assert shop.trace.count() == 1


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads",)))
def test_events_and_counters_say_what_was_deduplicated(shop: Shop, pool: str) -> None:
    # Given a worker that sends events, and somebody who listens
    shop.worker("-c", "2", "-E", "-P", pool)
    event = f"{shop.group}-1"
    with listening(shop.app) as heard:
        # When an event is sent twice to a shard, and twice to the ordinary queue
        sent = [shop.send("once", "a", number, event=event) for number in (1, 2)]
        sent += [shop.app.send_task("plain.late", (event, 3), queue=f"{shop.group}-plain") for _ in range(2)]
        for result in sent:
            result.get(timeout=20)
        # Then an event tells each duplicate
        assert wait_until(lambda: len(told(heard, "task-deduplicated")) == 2, timeout_seconds=20), kinds(heard)
        assert wait_until(lambda: len(told(heard, "task-succeeded")) == 4, timeout_seconds=20), kinds(heard)
    duplicates = told(heard, "task-deduplicated")
    assert {each["uuid"] for each in duplicates} < {result.id for result in sent}
    assert {each["name"] for each in duplicates} == {"payments.once", "plain.late"}
    # And the vitals of the shard count the one that came to it
    assert wait_until(lambda: counted(shop, "deduplicated") == 1, timeout_seconds=20)


def test_the_commit_of_a_paused_run_that_was_taken_over_is_refused_and_told(shop: Shop) -> None:
    # Given a run in a worker that freezes, and a lease of two seconds
    frozen = shop.worker("-c", "1", "-E", "-Q", f"{shop.group}-plain")
    event = f"{shop.group}-1"
    stale = shop.app.send_task("plain.late", (event, 1, 1.0), queue=f"{shop.group}-plain")
    assert shop.trace.wait_for(1, kind="start")
    processes = [frozen.pid, *frozen.children()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        # When another worker gets the same event, then it takes over when the lease has lapsed
        shop.worker("-c", "1", "-E", "-Q", f"{shop.group}-plain")
        fresh = shop.app.send_task("plain.late", (event, 2), queue=f"{shop.group}-plain")
        assert fresh.get(timeout=30) == f"{event} by 2"
        with listening(shop.app) as heard:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
            # And what the first one returns is not its result
            with pytest.raises(ClaimLost):
                stale.get(timeout=30)
            assert wait_until(lambda: told(heard, "task-commit-refused"), timeout_seconds=20), heard
    finally:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert told(heard, "task-commit-refused")[0]["uuid"] == stale.id
    assert "commit was refused" in frozen.output
    # And the one that committed stands
    assert shop.app.send_task("plain.late", (event, 3), queue=f"{shop.group}-plain").get(timeout=20) == f"{event} by 2"


def logged(shop: Shop, text: str) -> int:
    return sum(worker.output.count(text) for worker in shop.workers)


@contextlib.contextmanager
def listening(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """The events that workers send meanwhile."""
    heard: list[dict[str, Any]] = []
    is_ready = threading.Event()

    class Listener(app.events.Receiver):
        def on_consume_ready(self, *arguments: Any, **options: Any) -> None:
            is_ready.set()

    with app.connection_for_read() as connection:
        receiver = Listener(connection, handlers={"*": heard.append})
        thread = threading.Thread(target=receiver.capture)
        thread.start()
        try:
            assert is_ready.wait(30)
            yield heard
        finally:
            receiver.should_stop = True
            thread.join(30)


def told(heard: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in heard if event["type"] == kind]


def kinds(heard: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["type"], event.get("uuid", "")) for event in heard]


def counted(shop: Shop, what: str) -> int:
    """Return the sum of a counter in the newest vitals."""
    with Connection(shop.broker_url) as connection:
        for batch in read_backwards(connection, shop.names.journal):
            for _, event in reversed(batch):
                if event.get("event") == "vitals":
                    return sum(shard["counters"].get(what, 0) for shard in event["owned"].values())
    return 0


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_without_a_store_for_claims_a_worker_ends_with_one_line(shop: Shop, pool: str) -> None:
    # Given deduplicated tasks without a result backend, when a worker starts
    worker = shop.worker(*pool_options(pool, 1), wait_seconds=0, SHOP_BACKEND="rpc://")
    # Then it ends with a failure, and one line lists what serves
    assert worker.wait() != 0
    [line] = [line for line in worker.output.splitlines() if "does not start" in line]
    assert "redis://" in line
    assert "Traceback" not in worker.output
