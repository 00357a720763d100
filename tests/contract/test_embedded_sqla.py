"""What holds on `sqla+sqlite:///FILE`: real worker processes with prefork pools, and publishers beside them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.result import AsyncResult
from kombu.compression import encoders
from kombu.serialization import loads

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import LockHeld, TopologyMismatch
from celery_sharding.testing import Trace, WorkerNode, check_order
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.paths import APPS, python_path

pytestmark = [
    pytest.mark.timeout(120),
    # kombu's own model, read by SQLAlchemy 2.1.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

GROUP = "orders"
NAMES = Names(GROUP)


class Shop:
    """A database, its workers, and a publisher in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "broker.sqlite"
        self.trace = Trace(folder / "trace")
        (folder / "results").mkdir()
        self.env = {
            "SHOP_BROKER": f"sqla+sqlite:///{self.file}",
            "SHOP_BACKEND": f"file://{folder}/results",
            "SHOP_TRACE": str(self.trace.path),
            "PYTHONPATH": python_path(APPS),
        }
        self.app = self.publisher(shards=4)
        self.ordinary = Celery(
            "ordinary", broker=self.env["SHOP_BROKER"], backend=self.env["SHOP_BACKEND"], set_as_current=False
        )
        self.workers: list[WorkerNode] = []
        self.published: list[tuple[str, int]] = []

    def publisher(self, *, shards: int) -> Celery:
        app = Celery(
            "publisher", broker=self.env["SHOP_BROKER"], backend=self.env["SHOP_BACKEND"], set_as_current=False
        )
        app.conf.sharding_routes = {"embedded_shop.*": {"group": GROUP, "key": "key"}}
        Sharding(app, groups=[ShardGroup(GROUP, shards=shards)])
        return app

    def send(self, task: str, key: str, number: int, **kwargs: object) -> AsyncResult:
        self.published.append((key, number))
        return self.app.send_task(f"embedded_shop.{task}", kwargs={"key": key, "number": number, **kwargs})

    def worker(self, *arguments: str, wait_seconds: float = 40.0, **env: str) -> WorkerNode:
        name = f"w{len(self.workers)}-{uuid.uuid4().hex[:6]}@test"
        node = WorkerNode("embedded_shop", name, arguments or ("-c", "4"), env={**self.env, **env}, folder=self.folder)
        self.workers.append(node)
        return node.start(wait_seconds=wait_seconds)

    def verdict(self):
        return check_order(self.trace, self.published)

    def rows(self, *, held: bool = False) -> dict[str, int]:
        """Return queue of the group → its rows; all of them, or those that a worker holds or held when it died."""
        with sqlite3.connect(self.file) as database:
            found = database.execute(
                "SELECT kombu_queue.name, count(*) FROM kombu_message JOIN kombu_queue "
                "ON kombu_queue.id = kombu_message.queue_id "
                "WHERE kombu_queue.name LIKE 'shards.%' AND visible <= ? GROUP BY 1",
                (0 if held else 1,),
            )
            return dict(found.fetchall())


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    for worker in shop.workers:
        worker.kill()


def test_tasks_of_a_key_run_in_the_order_of_their_publishing(shop: Shop) -> None:
    # Given 10 keys with 30 tasks each, half of them from before the worker
    for number in range(150):
        shop.send("step", f"k{number % 10}", number)
    shop.worker()
    for number in range(150, 300):
        shop.send("step", f"k{number % 10}", number)
    # When all have run
    assert shop.trace.wait_for(300), shop.verdict()
    # Then nothing is lost, repeated, overlapping or out of order, and nothing is left in the database
    assert shop.verdict().is_clean, shop.verdict()
    assert wait_until(lambda: not shop.rows(), timeout_seconds=10), shop.rows()


def test_warm_stops_in_the_middle_lose_repeat_and_reorder_nothing(shop: Shop) -> None:
    # Given a backlog of tasks that take longer than being fetched
    for number in range(240):
        shop.send("step", f"k{number % 2}", number, seconds=0.05)
    # When its worker is stopped warm and another one starts, twice
    for turn in (1, 2):
        done = shop.trace.count()
        worker = shop.worker()
        assert shop.trace.wait_for(done + 10), shop.verdict()
        worker.signal(signal.SIGTERM)
        for _ in range(3):  # its loop looks for its end when a message comes, or every two seconds
            shop.ordinary.send_task("embedded_shop.plain", args=(0,))
        assert worker.wait() == 0
        shop.send("step", "k0", 1000 + turn)
    assert shop.trace.count() < 240
    shop.worker()
    # Then all ran once and in order
    assert shop.trace.wait_for(242), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_a_killed_worker_loses_and_reorders_nothing(shop: Shop) -> None:
    # Given a worker that holds more of a backlog than it runs
    for number in range(160):
        shop.send("step", f"k{number % 2}", number, seconds=0.05)
    worker = shop.worker()
    assert shop.trace.wait_for(20), shop.verdict()
    # When it is killed, more is published, and another starts
    worker.kill()
    assert sum(shop.rows(held=True).values()) > 4
    for number in range(160, 180):
        shop.send("step", f"k{number % 2}", number)
    shop.worker()
    # Then everything came to its end, in order; what the first one ran when it died may have run twice
    assert shop.trace.wait_for(180), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.overlapping, verdict.out_of_order) == (0, 0, 0), verdict
    assert verdict.repeated <= 4, verdict


def test_ordinary_tasks_beside_do_not_stop_the_lanes(shop: Shop) -> None:
    # Given a worker with fewer processes than there is work of either kind
    for number in range(60):
        shop.send("step", f"k{number % 6}", number)
    plain = [shop.ordinary.send_task("embedded_shop.plain", args=(number,)) for number in range(20)]
    shop.worker("-c", "2")
    # When both run
    assert shop.trace.wait_for(60), shop.verdict()
    # Then both come to their end
    assert [result.get(timeout=40) for result in plain] == [number + 1 for number in range(20)]
    assert shop.verdict().is_clean, shop.verdict()


def test_a_task_in_a_pool_process_publishes_to_another_key(shop: Shop) -> None:
    # Given tasks that publish tasks
    for number in range(20):
        shop.send("parent", f"k{number % 4}", number)
    # When a worker runs them in processes that it forks while it is connected
    shop.worker("-c", "2", "--max-tasks-per-child", "4")
    # Then what they published runs, too, in order
    assert shop.trace.wait_for(20), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


def test_a_child_that_is_forked_beside_a_transaction_publishes(shop: Shop) -> None:
    # Given a process with a thread that publishes, declares, or consumes
    command = [sys.executable, str(APPS / "forking_process.py")]
    # When it forks in the middle of that, and its child publishes
    done = subprocess.run(command, env={**os.environ, **shop.env}, check=False, capture_output=True, text=True)
    # Then no child hangs or fails, whatever the thread did
    assert done.stdout == "[0, 0, 0, 0]\n", done


def test_a_retry_holds_its_key_and_no_other(shop: Shop) -> None:
    # Given a task that retries twice, a successor of its key, and a task of another key
    retried = shop.send("again", "a", 1)
    shop.send("step", "a", 2)
    shop.send("step", "b", 1)
    # When all have run
    shop.worker()
    assert shop.trace.wait_for(3), shop.verdict()
    # Then the successor came after the retries, the other key before them
    assert [(mark.key, mark.number) for mark in shop.trace.read() if mark.kind == "end"] == [
        ("b", 1),
        ("a", 1),
        ("a", 2),
    ]
    assert retried.get(timeout=10) == 2


def test_a_task_that_kills_its_process_becomes_a_dead_letter_that_can_be_read(shop: Shop) -> None:
    # Given a task that kills its pool process, and its successor
    poison = shop.send("poison", "a", 1)
    shop.send("step", "a", 2)
    # When the successor has run
    shop.worker()
    assert shop.trace.wait_for(1), shop.verdict()
    # Then the poison was begun as often as allowed, and is kept with its reason
    assert [mark.number for mark in shop.trace.read() if mark.kind == "begin"] == [1, 1, 1]
    with shop.app.connection_for_read() as connection:
        letter = connection.default_channel.basic_get(NAMES.dead, no_ack=True)
    assert letter.headers["id"] == poison.id
    assert letter.headers["shard_dead_reason"] == "lost 3 times"
    assert letter.decode()[1] == {"key": "a", "number": 1}


def test_a_second_worker_is_refused_and_told_who_is_the_first(shop: Shop) -> None:
    # Given a worker
    first = shop.worker()
    # When a second one starts
    second = shop.worker(wait_seconds=0)
    # Then it ends with an error that names the first
    assert second.wait() != 0
    assert f"consumed by another worker ({first.name}, process {first.pid})" in second.output
    # And the first goes on
    shop.send("step", "a", 1)
    assert shop.trace.wait_for(1)


def test_another_number_of_shards_is_refused_while_messages_wait(shop: Shop) -> None:
    # Given a message that waits in one of 4 shards
    shop.send("step", "a", 1)
    # When a publisher or a worker has 8, then both are refused
    other = shop.publisher(shards=8)
    with pytest.raises(TopologyMismatch, match="4 shards on the embedded broker, 8 in the configuration"):
        other.send_task("embedded_shop.step", kwargs={"key": "a", "number": 2})
    refused = shop.worker(wait_seconds=0, SHOP_SHARDS="8")
    assert refused.wait() != 0
    assert "4 shards on the embedded broker, 8 in the configuration" in refused.output
    # And while a worker with 4 runs, although nothing waits any more
    worker = shop.worker()
    assert shop.trace.wait_for(1)
    assert wait_until(lambda: not shop.rows(), timeout_seconds=10)
    with pytest.raises(LockHeld):
        other.send_task("embedded_shop.step", kwargs={"key": "a", "number": 2})
    # But not when it has stopped
    assert worker.stop() == 0
    other.send_task("embedded_shop.step", kwargs={"key": "a", "number": 2})
    shop.worker(SHOP_SHARDS="8")
    assert shop.trace.wait_for(2)


def test_every_serializer_and_compression_runs_retries_changed_and_dies_as_it_was(shop: Shop) -> None:
    # Given a worker that accepts all serializers
    serializers = ("json", "pickle", "yaml", "msgpack")
    shop.worker("-c", "2", SHOP_SETTINGS=json.dumps({"accept_content": serializers}), C_FORCE_ROOT="1")
    # When tasks of all serializers and compressions come, some that change their arguments, some that are rejected
    results, rejected = [], {}
    for number, (serializer, compression) in enumerate(itertools.product(serializers, (None, *encoders()))):
        options = {"serializer": serializer, "compression": compression}
        for task in ("step", "changed", "reject"):
            kwargs = {"key": f"k{number}", "number": number}
            sent = shop.app.send_task(f"embedded_shop.{task}", kwargs=kwargs, **options)
            if task == "reject":
                rejected[sent.id] = number
            else:
                results.append((sent, None if task == "step" else "second"))
    # Then they run
    for sent, expected in results:
        assert sent.get(timeout=60) == expected
    # and what was rejected is a dead letter that can be read as it was published
    letters: dict[str, int] = {}

    def take() -> bool:
        with shop.app.connection_for_read() as connection:
            while (letter := connection.default_channel.basic_get(NAMES.dead, no_ack=True)) is not None:
                _, kwargs, _ = loads(letter.body, letter.content_type, letter.content_encoding, force=True)
                letters[letter.headers["id"]] = kwargs["number"]
        return len(letters) >= len(rejected)

    assert wait_until(take, timeout_seconds=60), letters
    assert letters == rejected
