"""What a worker promises: order, retries in place, dead letters, endings. Real workers on a real broker."""

from __future__ import annotations

import json
import time

import pytest
from amqp import Message
from celery import Celery
from kombu import Connection
from kombu.compression import decompress

from celery_sharding.rabbitmq.streams import read_to_end
from celery_sharding.testing.processes import wait_until
from support.pools import POOLS, pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_of_a_key_run_in_the_order_of_their_publishing(shop: Shop, pool: str) -> None:
    # Given messages from before the first worker, and more while it runs
    for number in range(60):
        shop.send("step", f"k{number % 6}", number)
    shop.worker(*pool_options(pool))
    for number in range(60, 120):
        shop.send("step", f"k{number % 6}", number)
    # When all have run
    assert shop.trace.wait_for(120, timeout_seconds=40), shop.verdict()
    # Then nothing is lost, repeated, overlapping or out of order
    assert shop.verdict().is_clean, shop.verdict()


def test_keys_of_one_shard_run_side_by_side(shop: Shop) -> None:
    # Given one shard and two keys whose tasks take long
    shop.worker(SHOP_SHARDS="1")
    # When one task of each is published
    for key in ("a", "b"):
        shop.send("step", key, 1, seconds=3)
    # Then the second starts before the first ends
    assert shop.trace.wait_for(2)
    assert [mark.kind for mark in shop.trace.read()] == ["start", "start", "end", "end"]


def test_ordering_by_shard_runs_one_task_at_a_time(shop: Shop) -> None:
    # Given one shard that is ordered as a whole
    shop.worker(SHOP_SHARDS="1", SHOP_ORDERING="shard")
    # When tasks of several keys are published
    for number in range(12):
        shop.send("step", f"k{number % 4}", number)
    # Then they run one after the other, in the order of all
    assert shop.trace.wait_for(12)
    assert [mark.kind for mark in shop.trace.read()] == ["start", "end"] * 12
    assert [mark.number for mark in shop.trace.read() if mark.kind == "start"] == list(range(12))


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_retry_holds_its_key_and_no_other(shop: Shop, pool: str) -> None:
    # Given a task that retries twice, with a successor of its key and a task of another key behind it
    shop.worker(*pool_options(pool))
    retried = shop.send("again", "a", 1)
    shop.send("step", "a", 2)
    shop.send("step", "b", 1)
    # When all have run
    assert shop.trace.wait_for(3), shop.verdict()
    # Then the key's successor came after the retries, and the other key before them
    ends = [(mark.key, mark.number) for mark in shop.trace.read() if mark.kind == "end"]
    assert ends == [("b", 1), ("a", 1), ("a", 2)]
    assert retried.get(timeout=10) == 2


def test_a_retry_may_change_its_arguments(shop: Shop) -> None:
    # Given a task that asks for another run with another argument
    shop.worker()
    # When it runs
    result = shop.send("changed", "a", 1)
    # Then the second run has the new argument
    assert result.get(timeout=20) == "second"


def test_automatic_retries_are_counted_and_end_in_failure(shop: Shop) -> None:
    # Given a task with autoretry_for, max_retries=2 and backoff
    shop.worker()
    result = shop.send("divide", "a", 1)
    shop.send("step", "a", 2)
    # When its retries are used up
    with pytest.raises(ZeroDivisionError):
        result.get(timeout=30)
    # Then it ran three times, and only then its successor
    assert shop.trace.wait_for(1)
    assert [mark.kind for mark in shop.trace.read()] == ["begin"] * 3 + ["start", "end"]


def test_a_retry_into_another_queue_is_refused(shop: Shop) -> None:
    # Given a task that calls retry(queue=…)
    shop.worker()
    # When it runs, then it fails with an error that says why
    with pytest.raises(Exception, match=r"retry\(queue="):
        shop.send("moved", "a", 1).get(timeout=20)


def test_a_failed_task_lets_its_key_go_on(shop: Shop) -> None:
    # Given a task that raises, and a successor of its key
    shop.worker()
    result = shop.send("fail", "a", 1)
    shop.send("step", "a", 2)
    # When both have run, then the first failed and the second ended
    with pytest.raises(ValueError, match="no luck with 1"):
        result.get(timeout=20)
    assert shop.trace.wait_for(1)


def test_failures_are_kept_as_dead_letters_where_the_group_says_so(shop: Shop) -> None:
    # Given a group with on_failure="dead-letter"
    shop.worker(SHOP_ON_FAILURE="dead-letter")
    # When a task fails
    result = shop.send("fail", "a", 7)
    shop.send("step", "a", 8)
    # Then its message is kept with reason, key and time, the result is FAILURE, and the key goes on
    [letter] = shop.dead_letters(1)
    headers = letter.headers
    assert (headers["shard_dead_reason"], headers["shard_dead_error"]) == ("failed: ValueError", "no luck with 7")
    assert headers["shard_key"] == "a"
    assert headers["shard_dead_at"] > 0
    with pytest.raises(ValueError, match="no luck"):
        result.get(timeout=20)
    assert shop.trace.wait_for(1)
    # And the journal, which holds no data of users, does not repeat what the error says
    with Connection(shop.broker_url) as connection:
        told = [event for _, event in read_to_end(connection, shop.names.journal) if event["event"] == "dead"]
    assert [event["reason"] for event in told] == ["failed: ValueError"]
    assert "no luck" not in str(told)


def test_a_task_that_kills_its_child_becomes_a_dead_letter_after_max_attempts(shop: Shop) -> None:
    # Given a task that kills the process it runs in, with a successor
    shop.worker()
    result = shop.send("poison", "a", 1)
    shop.send("step", "a", 2)
    # When it has used up its attempts
    [letter] = shop.dead_letters(1)
    # Then it ran max_attempts times, its result says so, and the successor ran
    assert shop.trace.wait_for(1)
    assert [mark.kind for mark in shop.trace.read()] == ["begin"] * 3 + ["start", "end"]
    assert letter.headers["shard_dead_attempts"] == 3
    with pytest.raises(Exception, match=r"Worker exited prematurely|signal 9"):
        result.get(timeout=20)


def test_a_task_that_kills_its_worker_becomes_a_dead_letter_after_max_attempts(shop: Shop) -> None:
    # Given a task that kills the whole worker, with a successor of its key
    worker = shop.worker()
    result = shop.send("poison_parent", "a", 1)
    shop.send("step", "a", 2)
    # When the worker is started again each time it dies
    starts = 1
    while not shop.trace.wait_for(1, timeout_seconds=0.5):
        assert starts <= 6, shop.trace.read()
        if not worker.is_running:
            starts += 1
            worker.start(wait_seconds=0)
    # Then it began max_attempts times, and the successor ran
    assert [mark.kind for mark in shop.trace.read()] == ["begin"] * 3 + ["start", "end"]
    [letter] = shop.dead_letters(1)
    assert letter.headers["shard_dead_attempts"] == 3
    with pytest.raises(Exception, match="never finished"):
        result.get(timeout=20)


def test_a_hard_time_limit_is_a_failure_and_the_key_goes_on_when_the_run_has_ended(shop: Shop) -> None:
    # Given a task with time_limit=1 that never ends, and a successor
    shop.worker()
    result = shop.send("endless", "a", 1)
    shop.send("step", "a", 2)
    # When the limit has passed, then it failed once and the successor ran
    with pytest.raises(Exception, match="TimeLimitExceeded"):
        result.get(timeout=20)
    assert shop.trace.wait_for(1)
    assert [mark.kind for mark in shop.trace.read()] == ["begin", "start", "end"]


def test_a_retry_may_set_the_time_limit_of_the_next_run(shop: Shop) -> None:
    # Given a task whose retry asks for time_limit=1, and then takes too long
    shop.worker()
    result = shop.send("tightened", "a", 1)
    # Then it fails by that limit, and its key goes on
    with pytest.raises(Exception, match="TimeLimitExceeded"):
        result.get(timeout=30)
    shop.send("step", "a", 2)
    assert shop.trace.wait_for(1)


def test_a_soft_time_limit_is_a_failure(shop: Shop) -> None:
    # Given a task with soft_time_limit=1 that sleeps on
    shop.worker()
    # When the limit has passed, then it failed
    with pytest.raises(Exception, match="SoftTimeLimitExceeded"):
        shop.send("soft", "a", 1).get(timeout=20)


def test_a_revoked_task_does_not_run_and_its_key_goes_on(shop: Shop) -> None:
    # Given a task that waits in its lane behind a long one
    shop.worker()
    shop.send("step", "a", 1, seconds=6)
    revoked = shop.send("step", "a", 2)
    shop.send("step", "a", 3)
    # When it is revoked
    assert shop.trace.wait_for(1, kind="start")
    shop.app.control.revoke(revoked.id, reply=True, timeout=2)
    # Then only the others run
    assert shop.trace.wait_for(2)
    assert [mark.number for mark in shop.trace.read() if mark.kind == "end"] == [1, 3]
    assert wait_until(lambda: revoked.state == "REVOKED", timeout_seconds=10)


def test_a_terminated_task_ends_before_the_next_of_its_key_starts(shop: Shop) -> None:
    # Given a running task and a successor
    shop.worker()
    running = shop.send("step", "a", 1, seconds=30)
    shop.send("step", "a", 2)
    assert shop.trace.wait_for(1, kind="start")
    # When it is revoked with terminate
    shop.app.control.revoke(running.id, terminate=True)
    # Then the successor runs, and it is not run again
    assert shop.trace.wait_for(1)
    assert [(mark.kind, mark.number) for mark in shop.trace.read()] == [("start", 1), ("start", 2), ("end", 2)]
    assert wait_until(lambda: running.state == "REVOKED", timeout_seconds=10)


def test_a_run_that_is_to_be_terminated_while_it_waits_for_a_thread_comes_to_its_own_end(shop: Shop) -> None:
    # Given a worker whose only thread is busy with an ordinary task, and a run that waits for it
    worker = shop.worker("-c", "1", "-P", "threads")
    with shop.occupied():
        waiting = shop.send("step", "a", 1)
        shop.send("step", "a", 2)
        worker.wait_for(f"{waiting.id}] received")
        # When it is revoked with terminate, which threads cannot do
        assert shop.app.control.revoke(waiting.id, terminate=True, reply=True, timeout=10)
    # Then it runs all the same, and holds nobody up
    assert shop.trace.wait_for(2), shop.trace.read()
    assert shop.verdict().is_clean, shop.verdict()


def test_an_expired_task_is_revoked_by_the_worker(shop: Shop) -> None:
    # Given a task that expires before any worker runs
    expired = shop.send("step", "a", 1, expires=0.2)
    shop.send("step", "a", 2)
    due = time.monotonic() + 0.3
    assert wait_until(lambda: time.monotonic() > due, timeout_seconds=2)
    # When a worker starts
    shop.worker()
    # Then the task is REVOKED, not run, and not taken by the broker
    assert shop.trace.wait_for(1)
    assert wait_until(lambda: expired.state == "REVOKED", timeout_seconds=10)
    assert [mark.number for mark in shop.trace.read()] == [2, 2]


def test_a_rate_limit_delays_the_lane_and_keeps_its_order(shop: Shop) -> None:
    # Given a task limited to 5 a second, with an unlimited successor of its key
    shop.worker()
    for number in range(4):
        shop.send("limited", "a", number)
    shop.send("step", "a", 4)
    # When all have run
    assert shop.trace.wait_for(5)
    # Then they kept their order, and took their time
    marks = shop.trace.read()
    assert shop.verdict().is_clean, shop.verdict()
    assert marks[-1].at - marks[0].at > 0.5


def test_a_message_that_cannot_run_becomes_a_dead_letter_and_the_shard_goes_on(shop: Shop, broker_url: str) -> None:
    # Given a worker, and messages by hand: undecodable, not registered, foreign, of a task that is not sharded
    shop.worker(SHOP_SHARDS="1")
    shop.send("step", "a", 1)
    assert shop.trace.wait_for(1)
    with Connection(broker_url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()

        def put(body: bytes, **properties: object) -> None:
            channel.basic_publish(Message(body, **properties), exchange=shop.names.publish, routing_key="a")

        put(b"\xff\xfe{", content_type="application/json", content_encoding="utf-8")
        put(b"hello", content_type="text/plain")
        put(
            b"[[], {}, {}]",
            content_type="application/json",
            content_encoding="utf-8",
            application_headers={"task": "shop.unknown", "id": "1", "lang": "py"},
        )
        put(
            b"[[1], {}, {}]",
            content_type="application/json",
            content_encoding="utf-8",
            application_headers={"task": "shop.plain", "id": "2", "lang": "py"},
        )
        put(
            b"[1]",
            content_type="application/json",
            content_encoding="utf-8",
            application_headers={"task": "shop.step", "id": "3", "lang": "py"},
        )
        put(
            b"\x80\x04N.",
            content_type="application/x-python-serialize",
            content_encoding="binary",
            application_headers={"task": "shop.step", "id": "4", "lang": "py"},
        )
    # When a good one follows
    shop.send("step", "a", 2)
    # Then the good one runs, and each bad one is kept with its reason
    assert shop.trace.wait_for(2)
    reasons = sorted(letter.headers["shard_dead_reason"] for letter in shop.dead_letters(6))
    assert len(reasons) == 6
    for part in ("cannot be decoded", "not registered", "does not belong", "is no task message", "accept_content"):
        assert any(part in reason for reason in reasons), (part, reasons)


def test_a_rejected_message_becomes_a_dead_letter(shop: Shop) -> None:
    # Given a task that raises Reject
    shop.worker()
    # When it runs
    shop.send("reject", "a", 1)
    shop.send("step", "a", 2)
    # Then its message is kept, and its key goes on
    [letter] = shop.dead_letters(1)
    assert letter.headers["shard_dead_reason"] == "rejected"
    assert shop.trace.wait_for(1)


def test_tasks_called_from_tasks_are_sharded_too(shop: Shop) -> None:
    # Given a task that calls another one of its key
    shop.worker()
    # When it runs
    shop.send("parent", "a", 1)
    # Then the other runs as well
    assert shop.trace.wait_for(1)


def test_ordinary_tasks_run_beside_shards(shop: Shop) -> None:
    # Given a worker
    shop.worker()
    # When an ordinary task is sent to its queue
    app = Celery("plain", broker=shop.broker_url, backend=shop.env["SHOP_BACKEND"], set_as_current=False)
    result = app.send_task("shop.plain", args=[1], queue=f"{shop.group}-plain")
    # Then it runs as ever
    assert result.get(timeout=20) == 2
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(f"{shop.group}-plain")


def test_a_dead_letter_of_a_compressed_task_can_be_read(shop: Shop) -> None:
    # Given a worker
    shop.worker()
    # When a compressed message is rejected
    shop.app.send_task("shop.reject", kwargs={"key": "a", "number": 1}, compression="zlib")
    # Then its dead letter has the body as it was published, and says how it is compressed
    [letter] = shop.dead_letters(1)
    body = decompress(letter.body, letter.headers["compression"])
    assert json.loads(body)[1] == {"key": "a", "number": 1}


def test_a_retry_of_a_run_from_an_ordinary_queue_goes_back_to_it(shop: Shop) -> None:
    # Given a task that became sharded while messages of it still wait in the ordinary queue
    shop.worker()
    app = Celery("before", broker=shop.broker_url, backend=shop.env["SHOP_BACKEND"], set_as_current=False)
    # When one of them asks for retries (not at once: Celery publishes a retry before it stores RETRY)
    queue = f"{shop.group}-plain"
    result = app.send_task("shop.again", kwargs={"key": "a", "number": 1, "countdown": 1}, queue=queue)
    # Then it is retried as Celery does, and nothing is lost
    assert result.get(timeout=30) == 2
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(queue)
