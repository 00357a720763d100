"""A backlog that was delivered before: its attempts are recorded ahead of the pool, and none counts without a run."""

from __future__ import annotations

import pytest
from amqp import Message
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.journal.attempts import AttemptLog
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.rabbitmq.streams import Event, read_to_end
from celery_sharding.testing.processes import wait_until
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)

SHARDS = 4
# As large as what was delivered at once before: see `test_takeover`.
PREFETCH = {"SHOP_PREFETCH": "1000"}


def send_backlog(shop: Shop, count: int, *, task: str = "step", keys: int = 20, **options: object) -> dict[str, int]:
    """Publish messages and let them be delivered once to nobody's use; return their numbers by message id."""
    ensure_group(lambda: Connection(shop.broker_url), ShardGroup(shop.group, SHARDS), owner="test")
    sent = {shop.send(task, f"k{number % keys}", number, **options).id: number for number in range(count)}
    delivered: list[Message] = []
    with Connection(shop.broker_url) as connection:
        for index in range(SHARDS):
            connection.channel().basic_consume(f"{shop.names.ring(1)}.{index:03}", callback=delivered.append)

        def are_delivered() -> bool:
            connection.drain_events(timeout=20)
            return len(delivered) == count

        assert wait_until(are_delivered, timeout_seconds=30), len(delivered)
    return {message.headers["shard_message_id"]: sent[message.headers["id"]] for message in delivered}


def attempts_of(shop: Shop) -> list[Event]:
    with Connection(shop.broker_url) as connection:
        return [event for _, event in read_to_end(connection, shop.names.attempts)]


def count(events: list[Event], name: str) -> int:
    return sum(event["event"] == name for event in events)


def most_announced(events: list[Event]) -> int:
    """Return how many messages at most had an attempt recorded and were not settled."""
    open_ids: set[str] = set()
    most = 0
    for event in events:
        if event["event"] == "attempt":
            open_ids.add(event["message_id"])
        elif event["event"] == "settled":
            open_ids.discard(event["message_id"])
        most = max(most, len(open_ids))
    return most


@pytest.mark.parametrize(
    "pool",
    [("-c", "1"), ("-P", "solo"), pytest.param(("-c", "1", "-P", "threads"), marks=pytest.mark.slow)],
    ids=["prefork", "solo", "threads"],
)
def test_attempts_of_a_backlog_are_recorded_ahead_of_the_slots(shop: Shop, pool: tuple[str, ...]) -> None:
    # Given a backlog of short tasks that was delivered before
    sent = send_backlog(shop, 300, seconds=0)
    # When a worker with one slot takes it over
    shop.worker(*pool, SHOP_MAX_ATTEMPTS="3", **PREFETCH)
    assert shop.trace.wait_for(300), shop.verdict()
    # Then each ran once, in order, and many attempts were confirmed together, each but once
    assert shop.verdict().is_clean, shop.verdict()
    assert wait_until(lambda: count(attempts_of(shop), "settled") == 300, timeout_seconds=20)
    events = attempts_of(shop)
    assert most_announced(events) > 5
    assert sorted(event["message_id"] for event in events if event["event"] == "attempt") == sorted(sent)


def test_the_last_attempt_is_recorded_only_for_a_run_that_has_its_slot(shop: Shop) -> None:
    # Given a backlog that was delivered before, in a group where the next run is the last
    send_backlog(shop, 60, seconds=0)
    # When a worker with two slots takes it over
    shop.worker("-c", "2", SHOP_MAX_ATTEMPTS="2", **PREFETCH)
    assert shop.trace.wait_for(60), shop.verdict()
    # Then no more attempts were recorded at a time than runs could begin
    assert shop.verdict().is_clean, shop.verdict()
    assert most_announced(attempts_of(shop)) <= 2


def test_what_was_recorded_ahead_does_not_count_when_the_shard_is_given_up(shop: Shop) -> None:
    # Given a worker in the middle of a backlog that was delivered before
    sent = send_backlog(shop, 300, seconds=0.02)
    worker = shop.worker("-c", "2", SHOP_MAX_ATTEMPTS="3", **PREFETCH)
    assert shop.trace.wait_for(60), shop.verdict()
    # When it gives its shards up
    shop.app.control.cancel_consumer(shop.group, destination=[worker.name])
    assert wait_until(lambda: worker.output.count("given up") == SHARDS, timeout_seconds=30)
    # Then some were recorded ahead, and none of those that did not begin has an attempt more than before
    events, log = attempts_of(shop), AttemptLog()
    for event in events:
        log.note(event)
    assert count(events, "withdrawn") > 0
    ended = {mark.number for mark in shop.trace.read() if mark.kind == "end"}
    left = [message_id for message_id, number in sent.items() if number not in ended]
    assert left
    counted = {each: known.attempts for each in left if (known := log.get(each)) is not None}
    assert set(counted.values()) == {1}, counted
    # And the next worker runs them
    shop.worker("-c", "2", SHOP_MAX_ATTEMPTS="3", **PREFETCH)
    assert shop.trace.wait_for(300), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_no_message_dies_for_runs_that_were_recorded_ahead_and_never_began(shop: Shop) -> None:
    # Given a group of three attempts, and a backlog that was delivered before
    send_backlog(shop, 400, seconds=0.01)
    # When three workers are killed in the middle of it, one after the other
    for _ in range(3):
        wanted = shop.trace.count() + 40
        worker = shop.worker("-c", "2", SHOP_MAX_ATTEMPTS="3", **PREFETCH)
        assert shop.trace.wait_for(wanted), shop.verdict()
        worker.kill()
    # Then a kill but the first may have cost the one that ran alone, on its last chance, or was about to; the others
    # run, in order
    shop.worker("-c", "2", SHOP_MAX_ATTEMPTS="3", **PREFETCH)
    assert wait_until(shop.has_nothing_left, timeout_seconds=60)
    letters = shop.dead_letters(0)
    assert len(letters) <= 2, [letter.headers for letter in letters]
    verdict = shop.verdict()
    assert (verdict.out_of_order, verdict.overlapping) == (0, 0), verdict
    assert verdict.lost <= len(letters), verdict
