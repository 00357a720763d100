"""What holds on `memory://`: a real worker in a thread of this process."""

from __future__ import annotations

import itertools
import queue
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from celery import Celery, _state
from celery.contrib.testing.worker import TestWorkController
from celery.exceptions import Reject
from celery.worker import state as worker_state
from kombu import Connection
from kombu.compression import encoders
from kombu.serialization import loads

from celery_sharding import ShardGroup, Sharding, deduplicate
from celery_sharding.brokers.embedded.ring import shard_of
from celery_sharding.errors import LockHeld, TopologyMismatch, Unroutable, UnsupportedBroker
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import RING_TYPE
from support.memory_shop import Shop

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def group() -> str:
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def shop(group: str) -> Shop:
    return Shop(group)


@pytest.fixture(autouse=True)
def _no_current_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a worker in this process sets for good."""
    default = _state.default_app
    monkeypatch.setattr(worker_state, "should_stop", None)
    yield
    _state.set_default_app(default)
    _state._set_current_app(default)


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_tasks_of_a_key_run_in_the_order_of_their_publishing(shop: Shop, pool: str) -> None:
    # Given 10 keys with 30 tasks each, half of them from before the worker
    messages = [(f"k{number % 10}", number) for number in range(300)]
    for key, number in messages[:150]:
        shop.step.delay(key=key, number=number)
    # When a worker runs them
    with shop.worker(pool):
        for key, number in messages[150:]:
            shop.step.delay(key=key, number=number)
        ran = shop.wait_for(300)
    # Then each ran once, and each key in its order
    assert sorted(ran) == sorted(messages)
    by_key = defaultdict(list)
    for key, number in ran:
        by_key[key].append(number)
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_retry_holds_its_key_and_no_other(shop: Shop, pool: str) -> None:
    # Given a task that retries twice, a successor of its key, and a task of another key
    def again(self, key: str, number: int) -> None:
        if self.request.retries < 2:
            raise self.retry(countdown=0.2)
        shop.effects.put((key, number))

    shop.task(again, name="again", bind=True).delay(key="a", number=1)
    shop.step.delay(key="a", number=2)
    shop.step.delay(key="b", number=1)
    # When all have run
    with shop.worker(pool):
        ran = shop.wait_for(3)
    # Then the successor came after the retries, the other key before them
    assert ran == [("b", 1), ("a", 1), ("a", 2)]


def test_a_failed_task_is_kept_as_a_dead_letter_that_can_be_read(group: str) -> None:
    # Given a group that keeps failures, a task that fails, and its successor
    shop = Shop(group, on_failure="dead-letter")

    def fail(key: str, number: int) -> None:
        raise ValueError("no luck")

    failed = shop.task(fail, name="fail").delay(key="a", number=1)
    shop.step.delay(key="a", number=2)
    # When the successor has run
    with shop.worker():
        assert shop.wait_for(1) == [("a", 2)]
    # Then the dead letter says what it was and why
    letter = shop.dead_letter()
    assert letter.headers["id"] == failed.id
    assert letter.headers["shard_key"] == "a"
    assert letter.headers["shard_dead_reason"] == "failed: ValueError"
    assert "no luck" in letter.headers["shard_dead_error"]
    assert letter.decode()[1] == {"key": "a", "number": 1}


def test_a_task_that_nobody_knows_becomes_a_dead_letter_and_the_shard_goes_on(shop: Shop) -> None:
    # Given a message of an unknown task in front of a known one
    shop.app.send_task("elsewhere.unknown", kwargs={"key": "a"})
    shop.step.delay(key="a", number=1)
    # When a worker runs
    with shop.worker():
        assert shop.wait_for(1) == [("a", 1)]
    # Then the unknown one is kept, with the reason
    assert "not registered" in shop.dead_letter().headers["shard_dead_reason"]


def test_a_warm_stop_and_the_next_start_lose_and_repeat_nothing(shop: Shop) -> None:
    # Given a worker that has fetched 40 messages and runs the first of each key until it is told to stop
    running: queue.Queue[TestWorkController] = queue.Queue()

    def hold(key: str, number: int) -> None:
        shop.effects.put((key, number))
        assert running.get(timeout=20).consumer.blueprint.shutdown_complete.wait(20)

    first = shop.task(hold, name="hold")
    for number in range(40):
        (first if number < 2 else shop.step).delay(key=f"k{number % 2}", number=number)
    with shop.worker() as worker:
        assert wait_until(lambda: shop.waiting() == 0, timeout_seconds=20)
        for _ in range(2):
            running.put(worker)
    # When it has stopped, with all but those two given back
    assert shop.waiting() == 38
    # And more is published and another worker starts
    for number in range(40, 50):
        shop.step.delay(key=f"k{number % 2}", number=number)
    with shop.worker():
        ran = shop.wait_for(50)
    # Then each ran once, and each key in its order
    for parity in (0, 1):
        assert [number for key, number in ran if key == f"k{parity}"] == list(range(parity, 50, 2))


def test_duplicates_of_a_deduplicated_task_have_one_effect(shop: Shop) -> None:
    # Given a task of which each message was sent three times
    @deduplicate(key="number", ttl_seconds=60)
    def once(key: str, number: int) -> int:
        shop.effects.put((key, number))
        return number * 10

    task = shop.task(once, name="once")
    results = [task.delay(key="a", number=number) for number in (1, 2) for _ in range(3)]
    shop.step.delay(key="a", number=3)
    # When all have run
    with shop.worker():
        # Then there is one effect of each, and every copy has its result
        assert shop.wait_for(3) == [("a", 1), ("a", 2), ("a", 3)]
        assert [result.get(timeout=10, disable_sync_subtasks=False) for result in results] == [10] * 3 + [20] * 3


def test_a_second_worker_is_refused_while_the_first_lives(shop: Shop) -> None:
    # Given a worker that consumes the group
    backing = shop.app.sharding.backing()
    group = shop.app.sharding.settings.groups[shop.names.group]
    # When another wants to, then it is refused by name
    with shop.worker(), pytest.raises(LockHeld, match="one worker only"):
        backing.join_group(SimpleNamespace(hostname="second@here"), group)
    # And it may when the first has stopped
    pool = SimpleNamespace(putlocks=True)
    backing.join_group(SimpleNamespace(hostname="second@here", connection=None, pool=pool), group)
    backing.open_log(SimpleNamespace(post=lambda call: call()), inline=None).stop()


def test_another_number_of_shards_is_refused_while_messages_wait(group: str) -> None:
    # Given a message that waits in one of 4 shards
    first, second = Shop(group, shards=4), Shop(group, shards=8)
    first.step.delay(key="a", number=1)
    # When the group has 8 in another app
    # Then publishing there is refused, and says how many there are
    with pytest.raises(TopologyMismatch, match="4 shards on the embedded broker, 8 in the configuration"):
        second.step.delay(key="a", number=2)
    # And it may when the message has run
    with first.worker():
        assert first.wait_for(1) == [("a", 1)]
    second.step.delay(key="a", number=2)
    with second.worker():
        assert second.wait_for(1) == [("a", 2)]


def test_a_message_that_no_queue_would_take_is_refused() -> None:
    # Given an exchange of our type without a queue
    name = f"shards.t{uuid.uuid4().hex[:12]}"
    Shop("unused").app.sharding.backing()
    with Connection("memory://") as connection:
        channel = connection.channel()
        channel.exchange_declare(name, RING_TYPE)
        # When something is published to it, then it is not dropped in silence
        with pytest.raises(Unroutable):
            channel.basic_publish(channel.prepare_message(b"{}"), name, "a")


def test_a_forked_child_is_told_that_the_broker_stayed_in_its_parent() -> None:
    # Given a process that has published
    script = """if True:
        import os
        from celery import Celery
        from celery_sharding import ShardGroup, Sharding
        from celery_sharding.errors import BrokerUnavailable
        app = Celery("forked", broker="memory://")
        Sharding(app, groups=[ShardGroup("forked", shards=2)])
        @app.task(shard_group="forked", shard_key="key", name="task")
        def task(key):
            pass
        task.delay(key="a")
        child = os.fork()
        if child == 0:
            try:
                task.delay(key="a")
            except BrokerUnavailable:
                os._exit(7)
            os._exit(0)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    # When its child publishes, then it is an error and not lost in silence
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7


@pytest.mark.parametrize(
    "url",
    ["redis://127.0.0.1:1", "filesystem://", "sqla+postgresql://nobody@127.0.0.1:1/none", "sqla+sqlite://"],
)
def test_brokers_that_cannot_keep_the_order_are_refused_before_anything_is_sent(url: str) -> None:
    # Given an app on such a broker
    app = Celery("refused", broker=url, set_as_current=False)
    Sharding(app, groups=[ShardGroup("refused", shards=2)])

    @app.task(shared=False, shard_group="refused", shard_key="key", name="task")
    def task(key: str) -> None:
        pass

    # When a sharded task is published, then the error names what serves
    with pytest.raises(UnsupportedBroker, match=r"RabbitMQ|memory"):
        task.delay(key="a")


def test_a_key_goes_to_the_same_shard_in_every_version() -> None:
    # Given keys of all kinds
    keys = ["42", "a", "customer-7", "schlüssel", "x" * 255, "0", "1", "2"]
    # Then their shards are those of the first release
    assert [shard_of(key, 8) for key in keys] == SHARDS_OF_8
    # And many keys use all shards
    assert {shard_of(str(number), 8) for number in range(200)} == set(range(8))


SHARDS_OF_8 = [2, 7, 2, 2, 2, 5, 6, 4]


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_every_serializer_and_compression_runs_or_dies_as_it_was(group, pool):
    # Given a worker that accepts all serializers
    shop = Shop(group)
    serializers = ("json", "pickle", "yaml", "msgpack")
    shop.app.conf.accept_content = serializers

    def refuse(key: str, number: int) -> None:
        raise Reject("not wanted", requeue=False)

    refused = shop.task(refuse, name="refuse")
    with shop.worker(pool):
        # When tasks of all serializers and compressions come
        combinations = list(itertools.product(serializers, (None, *encoders())))
        for number, (serializer, compression) in enumerate(combinations):
            for task in (shop.step, refused):
                task.apply_async((f"k{number}", number), serializer=serializer, compression=compression)
        # Then they run
        assert sorted(number for _, number in shop.wait_for(len(combinations))) == list(range(len(combinations)))
        # and what is rejected is a dead letter that can be read as it was published
        letters: list[int] = []

        def take() -> bool:
            while (letter := shop.dead_letter()) is not None:
                (_, number), _, _ = loads(letter.body, letter.content_type, letter.content_encoding, force=True)
                letters.append(number)
            return len(letters) >= len(combinations)

        assert wait_until(take, timeout_seconds=20), letters
    assert sorted(letters) == list(range(len(combinations)))
