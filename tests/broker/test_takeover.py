"""Who runs the tasks when workers come and go, and when the broker loses what it had. Real workers, real signals."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest
from kombu import Connection

from celery_sharding.rabbitmq.streams import read_to_end
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)


def test_rolling_restarts_under_load_lose_repeat_and_reorder_nothing(shop: Shop) -> None:
    # Given two workers under a stream of messages
    workers = [shop.worker("-c", "2"), shop.worker("-c", "2")]
    rng = random.Random(7)
    number = 0
    # When each is stopped warm and started again in turn, twice
    for worker in workers * 2:
        for _ in range(150):
            number += 1
            shop.send("step", f"k{rng.randrange(12)}", number)
        assert worker.stop() == 0
        worker.start()
    assert shop.trace.wait_for(number), shop.verdict()
    # Then nothing is lost, repeated, overlapping or out of order
    assert shop.verdict().is_clean, shop.verdict()


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_standby_takes_over_when_the_owner_is_killed(shop: Shop, pool: str) -> None:
    # Given an owner at work, and a standby
    owner = shop.worker(*pool_options(pool))
    shop.worker(*pool_options(pool))
    for number in range(200):
        shop.send("step", f"k{number % 8}", number)
    assert shop.trace.wait_for(30)
    # When the owner is killed
    killed_at = time.time()
    owner.kill()
    # Then the standby runs the rest in order; only what was running, or had just ended, may repeat
    assert shop.trace.wait_for(200, timeout_seconds=40), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= 4 + shop.just_ended(killed_at), verdict


def test_a_lost_ring_is_replaced_and_keeps_the_order(shop: Shop, restart_broker: Callable[[], None]) -> None:
    # Given a worker, and a publisher that goes on before, during and after a restart of the broker
    shop.worker()
    for number in range(80):
        shop.send("step", f"k{number % 8}", number)
    assert shop.trace.wait_for(20)
    restart_broker()
    # When messages are published before the worker has found its way back
    for number in range(80, 160):
        shop.send("step", f"k{number % 8}", number)
    # Then all run, in their order; only what was running at the restart may repeat
    assert shop.trace.wait_for(160, timeout_seconds=60), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order) == (0, 0), verdict


def test_a_worker_of_one_shard_leaves_the_others_alone(shop: Shop) -> None:
    # Given a worker for shard 1 of 4 only
    worker = shop.worker("-Q", f"{shop.group}.001", "-c", "1")
    assert f"{shop.group}" in worker.output
    worker.wait_for("consuming g001, 1 queues")
    # When messages of many keys are published
    for number in range(40):
        shop.send("step", f"k{number}", number)
    # Then some run here, and the rest runs when a worker takes the other shards
    assert shop.trace.wait_for(1)
    shop.worker("-X", f"{shop.group}/1", "-c", "2")
    assert shop.trace.wait_for(40), shop.verdict()
    assert shop.verdict().is_clean


def test_a_second_signal_ends_a_busy_worker_and_its_task_runs_elsewhere(shop: Shop) -> None:
    # Given an owner with a long task, and a standby
    owner = shop.worker()
    shop.send("step", "a", 1, seconds=4)
    assert shop.trace.wait_for(1, kind="start")
    shop.worker()
    # When the owner is told to quit at once
    owner.signal(signal.SIGQUIT)
    owner.wait()
    # Then the standby runs the task to its end
    assert shop.trace.wait_for(1), shop.verdict()
    assert shop.verdict().lost == 0


def test_a_shard_queue_deleted_by_an_operator_is_replaced(shop: Shop) -> None:
    # Given a worker that has run something
    shop.worker()
    shop.send("step", "a", 1)
    assert shop.trace.wait_for(1)
    # When someone deletes a shard queue
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(shop.names.shard(1, 2))
    # Then a new generation serves all keys, without a restart of the worker
    shop.workers[0].wait_for("consuming g002, 4 queues")
    for number in range(40):
        shop.send("step", f"k{number}", number)
    assert shop.trace.wait_for(41), shop.verdict()
    assert shop.verdict().is_clean


def test_an_exchange_that_vanishes_costs_nothing(shop: Shop) -> None:
    # Given a worker and a ring
    shop.worker()
    for number in range(20):
        shop.send("step", f"k{number % 4}", number)
    assert shop.trace.wait_for(20)
    # When the ring's exchange is deleted and messages go on
    with Connection(shop.broker_url) as connection:
        connection.channel().exchange_delete(shop.names.ring(1))
    for number in range(20, 40):
        shop.send("step", f"k{number % 4}", number)
    # Then the periodic look notices, and they run from limbo in their order
    assert shop.trace.wait_for(40, timeout_seconds=40), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_shards_are_spread_over_workers_that_join_and_leave_and_keep_their_order(shop: Shop) -> None:
    # Given one worker that owns all four shards, and a stream of messages
    first = shop.worker("-c", "2")
    number = 0

    def send(count: int) -> None:
        nonlocal number
        for _ in range(count):
            number += 1
            shop.send("step", f"k{number % 12}", number)

    def owned_by(worker: WorkerNode) -> int:
        send(3)
        return shop.owners().count(worker.name)

    # When a second joins, then each owns two
    second = shop.worker("-c", "2")
    assert wait_until(lambda: (owned_by(first), owned_by(second)) == (2, 2), timeout_seconds=30), shop.owners()
    # When the first leaves, then the second owns all
    assert first.stop() == 0
    assert wait_until(lambda: owned_by(second) == 4, timeout_seconds=30), shop.owners()
    # And nothing is lost, repeated, overlapping or out of order
    assert shop.trace.wait_for(number), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_messages_that_only_waited_in_a_stopped_worker_are_no_dead_letters(shop: Shop) -> None:
    # Given a group that runs a message once only, and an owner with messages in its lanes
    owner = shop.worker("-c", "1", SHOP_MAX_ATTEMPTS="1")
    for number in range(30):
        shop.send("step", "a", number, seconds=0.05)
    assert shop.trace.wait_for(3)
    # When it is stopped warm and another one goes on
    assert owner.stop() == 0
    shop.worker("-c", "1", SHOP_MAX_ATTEMPTS="1")
    # Then all of them run, once
    assert shop.trace.wait_for(30), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_restarts_do_not_condemn_messages_that_wait_for_their_rate_limit(shop: Shop) -> None:
    # Given messages of many keys that may run five a second, and a group that begins a message twice at most
    worker = shop.worker("-c", "4", SHOP_MAX_ATTEMPTS="2")
    for number in range(24):
        shop.send("limited", f"k{number}", number)
    # When the worker is restarted warm, again and again, while they wait at the heads of their lanes
    for done in (2, 6, 10):
        assert shop.trace.wait_for(done)
        assert worker.stop() == 0
        worker.start()
    # Then all of them run, once
    assert shop.trace.wait_for(24), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_restarts_condemn_neither_messages_that_only_wait_nor_tasks_that_retry(shop: Shop) -> None:
    # Given a worker with one process, a task that retries for a while, and messages that wait behind it
    worker = shop.worker("-c", "1")
    retried = shop.send("again", "r", 1, times=3, countdown=2)
    for number in range(40):
        shop.send("step", f"k{number % 10}", number, seconds=0.15)
    # When it is restarted warm more often than a message may be begun
    for _ in range(4):
        assert worker.stop() == 0
        worker.start()
    # Then nothing became a dead letter, and all of it ran
    assert retried.get(timeout=60) == 3
    assert shop.trace.wait_for(41), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_retry_that_waits_goes_on_waiting_under_the_next_owner(shop: Shop, end: str) -> None:
    # Given a task whose retry is due in some seconds, and one of its key behind it
    countdown_seconds = 5.0
    worker = shop.worker("-c", "2")
    shop.send("again", "r", 1, times=1, countdown=countdown_seconds)
    shop.send("step", "r", 2)
    assert shop.trace.wait_for(1, kind="begin")
    # When its worker is gone before that, and another takes over
    assert wait_until(lambda: _retries_recorded(shop) == 1, timeout_seconds=10)
    getattr(worker, end)()
    shop.worker("-c", "2")
    # Then it runs when it is due, and its successor after it
    assert shop.trace.wait_for(2), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
    begun = [mark.at for mark in shop.trace.read() if mark.kind == "begin"]
    assert begun[1] - begun[0] >= countdown_seconds


def _retries_recorded(shop: Shop) -> int:
    with Connection(shop.broker_url) as connection:
        return len([event for _, event in read_to_end(connection, shop.names.attempts) if event["event"] == "retry"])


def test_a_group_that_prefetches_one_message_gets_through_the_end_of_a_segment(shop: Shop) -> None:
    # Given a group with prefetch=1, and messages from before the first worker
    for number in range(5):
        shop.send("step", "a", number)
    shop.worker(SHOP_PREFETCH="1")
    # When more come
    for number in range(5, 10):
        shop.send("step", "a", number)
    # Then all run
    assert shop.trace.wait_for(10), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_owners_with_pools_of_all_sizes_keep_the_order_of_what_each_gives_back(shop: Shop) -> None:
    # Given a shard with more messages than an owner holds
    env = {"SHOP_SHARDS": "1"}
    owner = shop.worker("-c", "16", **env)
    for number in range(500):
        shop.send("step", f"k{number % 20}", number, seconds=0.1)
    # When its owner is replaced by one with a smaller pool, and that one by another, both before they are through
    for size in ("2", "8"):
        assert shop.trace.wait_for(shop.trace.count() + 10), shop.verdict()
        owner.kill()
        owner = shop.worker("-c", size, **env)
    # Then all of it runs in order
    assert shop.trace.wait_for(500), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict


def test_a_dead_letter_queue_that_was_deleted_is_declared_again(shop: Shop) -> None:
    # Given a worker, and an operator who deletes the dead-letter queue and the attempts
    shop.worker()
    shop.send("step", "a", 1)
    assert shop.trace.wait_for(1)
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(shop.names.dead)
        connection.channel().queue_delete(shop.names.attempts)
    # When a message is rejected, and another retries
    shop.send("reject", "a", 2)
    retried = shop.send("again", "a", 3)
    # Then both come to their end
    assert retried.get(timeout=40) == 2
    assert len(shop.dead_letters(1)) == 1


def test_a_key_goes_on_after_a_run_that_survived_its_termination(shop: Shop) -> None:
    # Given a running task and its successor
    shop.worker()
    running = shop.send("step", "a", 1, seconds=20)
    shop.send("step", "a", 2)
    assert shop.trace.wait_for(1, kind="start")
    # When it is revoked with a signal that ends the task, but not its process
    shop.app.control.revoke(running.id, terminate=True, signal="SIGUSR1")
    # Then its successor runs
    assert shop.trace.wait_for(1)
    assert shop.trace.read()[-1].number == 2


def test_a_solo_worker_is_not_cut_off_from_a_long_task(shop: Shop, rabbitmqctl: Callable[..., str]) -> None:
    # Given a solo worker with a short heartbeat on its connections
    def connections() -> list[str]:
        lines = rabbitmqctl("list_connections", "-q", "--no-table-headers", "pid", "timeout").splitlines()
        return sorted(pid for pid, timeout in (line.split("\t") for line in lines) if timeout == "2")

    worker = shop.worker("-P", "solo", SHOP_HEARTBEAT="2")
    before = connections()
    assert before
    # When tasks take longer than the broker would wait for a sign of life, with more behind them than a socket holds
    for number in range(1, 3):
        shop.send("step", "a", number, seconds=9)
    for number in range(3, 203):
        key = f"k{number % 8}"
        shop.app.send_task("shop.step", kwargs={"key": key, "number": number}, headers={"padding": 40_000 * "x"})
        shop.published.append((key, number))
    assert shop.trace.wait_for(202), shop.verdict()
    # Then all run once, over the same connections
    assert shop.verdict().is_clean, shop.verdict()
    assert connections() == before, worker.output
