"""`celery -A app shards …` as people and programs run it: real processes, a real broker, real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

from celery_sharding import ShardGroup, Sharding, topology
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import append, read_backwards
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.paths import python_path

pytestmark = pytest.mark.timeout(120)

APP = """
import os, time
from celery import Celery
from celery_sharding import ShardGroup, Sharding

app = Celery("store", broker=os.environ["STORE_BROKER"])
app.conf.task_default_queue = os.environ["STORE_GROUP"] + "-plain"
app.conf.broker_connection_retry_on_startup = True
app.conf.sharding_routes = {"billing.*": {"group": os.environ["STORE_GROUP"], "key": "account"}}
Sharding(app, groups=[ShardGroup(os.environ["STORE_GROUP"], shards=int(os.environ.get("STORE_SHARDS", "3")))])

@app.task(shard_group=os.environ["STORE_GROUP"], shard_key="key", ignore_result=True)
def nap(key, seconds):
    time.sleep(seconds)

@app.task
def plain():
    pass
"""
PLAIN_APP = "from celery import Celery\napp = Celery('plain', broker='amqp://guest:hunter2@127.0.0.1:1//')\n"


class Store:
    """An app in a folder of its own, and what its command line says."""

    def __init__(self, folder: Path, group: str, broker_url: str) -> None:
        self.group, self.names, self.broker_url = group, Names(group), broker_url
        self._folder = folder
        (folder / "store.py").write_text(APP)
        (folder / "plain.py").write_text(PLAIN_APP)
        path = python_path(folder)
        self.env = {"STORE_GROUP": group, "STORE_BROKER": broker_url, "PYTHONPATH": path}
        self.workers: list[WorkerNode] = []

    def run(self, *arguments: str, app: str = "store", **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "celery", "-A", app, "shards", *arguments]
        return subprocess.run(
            command, env={**os.environ, **self.env, **env}, capture_output=True, text=True, timeout=60
        )

    def status(self) -> dict[str, Any]:
        """Return what `status --json` says of the group."""
        done = self.run("status", self.group, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        (found,) = json.loads(done.stdout)["groups"]
        return found

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for the status until `condition` holds, and return it."""
        seen: list[dict[str, Any]] = []

        def look() -> bool:
            seen.append(self.status())
            return condition(seen[-1])

        assert wait_until(look, timeout_seconds=40), seen[-1]
        return seen[-1]

    def worker(self) -> WorkerNode:
        name = f"w{len(self.workers)}-{uuid.uuid4().hex[:6]}@test"
        self.workers.append(WorkerNode("store", name, ("-c", "2"), env=self.env, folder=self._folder))
        return self.workers[-1].start()

    def publish(self, *keys: str, seconds: float) -> None:
        app = Celery("publisher", broker=self.broker_url, set_as_current=False)
        app.conf.sharding_routes = {"store.nap": {"group": self.group, "key": "key"}}
        Sharding(app, groups=[ShardGroup(self.group, shards=3)])
        for key in keys:
            app.send_task("store.nap", kwargs={"key": key, "seconds": seconds})


@pytest.fixture
def store(tmp_path: Path, group_name: str, broker_url: str) -> Iterator[Store]:
    store = Store(tmp_path, group_name, broker_url)
    yield store
    for worker in store.workers:
        worker.kill()


def owners(status: dict[str, Any]) -> list[str | None]:
    return [row["owner"] for row in status["shards"]]


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_shows_groups_and_their_tasks_without_a_broker(store):
    done = store.run("list", STORE_BROKER="amqp://guest:hunter2@127.0.0.1:1//")

    headings, line = done.stdout.splitlines()
    assert headings.split() == ["GROUP", "SHARDS", "ORDERING", "QUEUE", "TYPE", "TASKS"]
    assert line.split() == [store.group, "3", "key", "quorum", "store.nap,", "billing.*"]
    # And a route that no task fits is said
    warning = "warning: sharding_routes['billing.*'] fits no task that is registered here\n"
    assert (done.returncode, done.stderr) == (0, warning)


# --- declare ---------------------------------------------------------------------------------------------------------


def test_declare_makes_a_group_ready_and_may_be_repeated(store, connection):
    first = store.run("declare", store.group)
    second = store.run("declare")

    assert (first.returncode, first.stdout) == (0, f"{store.group}: declared, generation 1, 3 shards\n")
    assert (second.returncode, second.stdout) == (0, f"{store.group}: in place, generation 1, 3 shards\n")
    assert topology.missing_shards(connection, store.names, 1, 3) == []


def test_declare_says_so_when_another_number_of_shards_is_live(store):
    store.run("declare")

    done = store.run("declare", STORE_SHARDS="5")

    assert (done.returncode, done.stdout) == (0, f"{store.group}: in place, generation 1, 3 shards\n")
    assert "set shards=3" in done.stderr


def test_declare_refuses_a_group_that_was_made_otherwise(store, connection):
    with brief_channel(connection) as channel:
        channel.exchange_declare(store.names.publish, "topic", durable=True, auto_delete=False)

    done = store.run("declare")

    assert (done.returncode, done.stdout) == (1, "")
    assert store.names.publish in done.stderr


# --- status ----------------------------------------------------------------------------------------------------------


def test_a_group_that_was_never_declared_is_no_success_and_keeps_the_schema(store):
    as_json, as_text = store.run("status", "--json"), store.run("status")

    (group,) = json.loads(as_json.stdout)["groups"]
    assert (group["declared"], group["shards"]) == (False, [])
    assert "run `celery shards declare`" in as_json.stderr
    assert "run `celery shards declare`" in as_text.stdout
    assert as_json.returncode == as_text.returncode == 1


def test_status_shows_every_shard_with_its_owner_and_standby_and_the_next_owner_after_a_kill(store):
    # Given two workers and a group at rest
    first = store.worker()
    store.wait_for(lambda status: owners(status) == [first.name] * 3)
    second = store.worker()
    found = store.wait_for(lambda status: all(row["standbys"] == [second.name] for row in status["shards"]))
    assert [row["state"] for row in found["shards"]] == ["idle"] * 3
    assert [row["queue"] for row in found["shards"]] == [store.names.shard(1, index) for index in range(3)]
    assert all(row["since"] and row["lag_seconds"] == 0 for row in found["shards"])
    # When the owner is killed
    first.kill()
    # Then the other owns all, and nobody stands by
    found = store.wait_for(lambda status: owners(status) == [second.name] * 3)
    found = store.wait_for(lambda status: not any(row["standbys"] for row in status["shards"]))
    assert [row["state"] for row in found["shards"]] == ["no standby"] * 3
    # And the table for people says the same
    done = store.run("status")
    assert done.returncode == 0
    header, headings, *rows = done.stdout.splitlines()
    assert header.startswith(f"{store.group}: generation 1, 3 shards, 0 waiting")
    assert headings.split()[:3] == ["SHARD", "STATE", "READY"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert all(second.name in row for row in rows)


def test_a_backlog_has_a_lag_which_is_estimated_once_the_owner_is_gone(store):
    # Given a worker with more to do than it can
    worker = store.worker()
    store.publish(*["a"] * 20, seconds=1)
    found = store.wait_for(lambda status: any(row["lag_seconds"] for row in status["shards"]))
    (busy,) = [row for row in found["shards"] if row["held"]]
    assert (busy["state"], busy["owner"], busy["lag_estimated"]) == ("no standby", worker.name, False)
    # And once it was seen for some seconds, how fast that gets less
    found = store.wait_for(lambda status: bool(status["shards"][busy["index"]]["clear_seconds"]))
    assert found["shards"][busy["index"]]["out_rate"] > found["shards"][busy["index"]]["in_rate"] >= 0
    # When it is killed
    worker.kill()
    # Then its shard is unowned, and the lag grows on from the last that was known
    found = store.wait_for(lambda status: owners(status) == [None] * 3 and status["shards"][busy["index"]]["ready"] > 0)
    orphan = found["shards"][busy["index"]]
    assert (orphan["state"], orphan["lag_estimated"]) == ("unowned", True)
    assert orphan["lag_seconds"] > busy["lag_seconds"]
    header = store.run("status").stdout.splitlines()[0]
    assert "worst lag ~" in header
    assert ", 3 unowned" in header


def test_what_was_published_before_the_first_worker_is_shown_in_limbo(store):
    store.publish("a", "b", seconds=0)
    found = store.wait_for(lambda status: status["limbo_ready"] == 2)
    assert (found["generation"], found["shards"], found["ready"]) == (0, [], 2)

    store.run("declare")

    found = store.status()
    (limbo,) = found["earlier"]
    assert (limbo["kind"], limbo["queue"], limbo["state"]) == ("limbo", store.names.limbo(1), "unowned")
    assert [row["state"] for row in found["shards"]] == ["waiting"] * 3
    assert "limbo001" in store.run("status").stdout


def test_a_shard_queue_that_is_gone_is_shown_as_missing(store, connection, group_name):
    # Given a group whose first segment is drained, of which somebody deleted two queues
    ensure_group(lambda: Connection(store.broker_url), ShardGroup(group_name, 3), owner="w")
    with brief_channel(connection) as channel:
        append(channel, store.names.manifest, drained(store.names))
        for index in (0, 2):
            channel.queue_delete(store.names.shard(1, index))
    # When the status is read
    states = [(row["state"], row["ready"]) for row in store.status()["shards"]]
    # Then the others are still looked at
    assert states == [("missing", None), ("unowned", 0), ("missing", None)]


def drained(names: Names) -> dict[str, Any]:
    return {"event": "drained", "segment": "limbo001", "queue": names.limbo(1), "by": "w", "at": time.time()}


# --- wrong usage, and no broker --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["status", "declare"])
def test_an_unknown_group_is_a_usage_error_that_names_the_nearest(store, verb):
    done = store.run(verb, store.group + "x")

    assert (done.returncode, done.stdout) == (2, "")
    assert f"did you mean {store.group!r}" in done.stderr


@pytest.mark.parametrize("verb", ["list", "status", "declare"])
def test_an_app_without_groups_is_told_which_two_lines_to_add(store, verb):
    done = store.run(verb, app="plain")

    assert (done.returncode, done.stdout) == (2, "")
    assert "from celery_sharding import Sharding, ShardGroup" in done.stderr
    assert 'Sharding(app, groups=[ShardGroup("orders", shards=8)])' in done.stderr


@pytest.mark.parametrize("arguments", [("status",), ("status", "--json"), ("declare",)])
def test_a_broker_out_of_reach_has_its_own_exit_code_and_no_password_is_shown(store, arguments):
    done = store.run(*arguments, STORE_BROKER="amqp://guest:hunter2@127.0.0.1:1//")

    assert (done.returncode, done.stdout) == (69, "")
    assert "amqp://guest:**@127.0.0.1:1//" in done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["status", "declare"])
def test_a_broker_url_that_cannot_be_read_shows_no_part_of_its_password(store, verb):
    done = store.run(verb, STORE_BROKER="amqp://guest:hunt/er2@127.0.0.1:1//")

    assert (done.returncode, done.stdout) == (2, "")
    assert "percent-encode" in done.stderr
    assert "hunt" not in done.stderr


@pytest.mark.parametrize("verb", ["list", "status", "describe", "declare", "locate", "doctor", "export"])
def test_every_verb_has_examples_in_its_help(store, verb):
    done = store.run(verb, "--help")

    assert done.returncode == 0
    assert f"celery -A shop shards {verb}" in done.stdout


# --- reading the journal from its end --------------------------------------------------------------------------------


@pytest.fixture
def journal(connection, group_name) -> str:
    with brief_channel(connection) as channel:
        topology.declare_logs(channel, group_name)
    return Names(group_name).journal


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 700])
def test_a_stream_is_read_from_its_end_to_its_beginning(connection, journal, count):
    with brief_channel(connection) as channel:
        for number in range(count):
            append(channel, journal, {"event": "x", "n": number})

    batches = list(read_backwards(connection, journal))

    assert [event["n"] for batch in reversed(batches) for _, event in batch] == list(range(count))
    assert count < 20 or 0 < len(batches[0]) <= 20


def test_the_last_owner_of_a_waiting_shard_is_found_behind_newer_events(connection, broker_url, group_name):
    # Given a shard with a message whose owner fell silent long ago, while others wrote on
    names = Names(group_name)
    ensure_group(lambda: Connection(broker_url), ShardGroup(group_name, 2), owner="w")
    gone = {"index": 0, "since": 0.0, "held": 1, "running": 0, "lag_seconds": 5.0, "counters": {}}
    lost_at = time.time() - 1_000
    with brief_channel(connection) as channel:
        append(channel, names.manifest, drained(names))
        append(
            channel,
            names.journal,
            {
                "event": "vitals",
                "at": lost_at,
                "by": "lost",
                "generation": 1,
                "owned": {names.shard(1, 0): gone},
                "standby": [],
            },
        )
        for number in range(300):
            append(
                channel,
                names.journal,
                {"event": "vitals", "at": lost_at + number, "by": "other", "generation": 1, "owned": {}, "standby": []},
            )
        append(channel, names.shard(1, 0), {"event": "x"})
    # When the status is read, as soon as the broker counts the message
    found: list[Any] = []

    def look() -> bool:
        found.append(read_snapshot(connection, [group_name]).groups[0].shards)
        return bool(found[-1][0].ready)

    assert wait_until(look, timeout_seconds=30)
    # Then the lag of that shard goes on from what it said
    waiting, other = found[-1]
    assert (waiting.state, waiting.lag_estimated, waiting.since) == ("unowned", True, lost_at)
    assert 1_005 <= waiting.lag_seconds <= 1_060
    assert (other.state, other.lag_seconds, other.since) == ("unowned", 0.0, None)
