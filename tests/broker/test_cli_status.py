"""`shards status` and `describe` on a real broker: workers' words are put into a real journal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.cli import shards
from celery_sharding.journal.events import DeadLettered, Handover, TaskFailed
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import append
from celery_sharding.testing import FaultProxy
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.paths import python_path

pytestmark = pytest.mark.timeout(120)


class Desk:
    """An operator's command line in this process, and a group of two shards."""

    def __init__(self, group: str, broker_url: str, connection: Any) -> None:
        self.group, self.names, self.broker_url = group, Names(group), broker_url
        self.queues = [self.names.shard(1, index) for index in range(2)]
        self._connection = connection

    def declare(self) -> None:
        ensure_group(lambda: Connection(self.broker_url), ShardGroup(self.group, shards=2), owner="test")
        drained = {
            "event": "drained",
            "segment": "limbo001",
            "queue": self.names.limbo(1),
            "by": "w",
            "at": time.time(),
        }
        with brief_channel(self._connection) as channel:
            append(channel, self.names.manifest, drained)

    def say(self, by: str, *indexes: int, standby: tuple[int, ...] = (), lag: float | None = None) -> None:
        facts = {"index": 0, "since": time.time() - 200, "held": 1, "running": 1, "lag_seconds": lag}
        facts |= {"counters": {"done": 7, "failed": 2}}
        owned = {self.queues[index]: facts for index in indexes}
        waits = [self.queues[index] for index in standby]
        self.write({"event": "vitals", "at": time.time(), "by": by, "generation": 1, "owned": owned, "standby": waits})

    def write(self, *events: dict[str, Any]) -> None:
        with brief_channel(self._connection) as channel:
            for event in events:
                append(channel, self.names.journal, event)

    def run(self, *arguments: str, url: str = "", management: str | None = None) -> Result:
        app = Celery("desk", broker=url or self.broker_url, set_as_current=False)
        app.conf.sharding_management_url = management
        Sharding(app, groups=[ShardGroup(self.group, shards=2)])
        context = CLIContext(app=app, no_color=True, workdir=None, quiet=False)
        done = CliRunner().invoke(shards, arguments, obj=context)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert "hunter2" not in done.output
        return done


@pytest.fixture
def desk(group_name: str, broker_url: str, connection: Any) -> Desk:
    return Desk(group_name, broker_url, connection)


@pytest.fixture
def management_url() -> str:
    url = os.environ.get("SHARDING_TEST_MANAGEMENT_URL")
    if not url:
        pytest.fail("SHARDING_TEST_MANAGEMENT_URL is not set; run `scripts/with_servers pytest …`", pytrace=False)
    return url


def test_check_says_what_is_wrong_and_only_then_fails(desk):
    # Given two shards, one without a standby
    desk.declare()
    desk.say("a@h", 0, 1, lag=100.0)
    desk.say("b@h", standby=(0,))
    # When nothing is wrong, or nothing is asked
    assert desk.run("status").exit_code == 0
    fine = desk.run("status", "--check")
    assert (fine.exit_code, fine.stderr) == (0, f"warning: {desk.group}: no standby: 1\n")
    # Then a lag that is too large is a failure, also with JSON alone on stdout
    late = desk.run("status", desk.group, "--check", "--max-lag", "1m30s", "--json")
    assert late.exit_code == 1
    assert f"{desk.group}: lag above 90 s: 0, 1\n" in late.stderr
    assert json.loads(late.stdout)["groups"][0]["shards"][0]["lag_seconds"] >= 100


def test_lines_of_json_and_chosen_columns(desk):
    desk.declare()
    desk.say("a@h", 0, 1, lag=3.0)

    rows = [json.loads(line) for line in desk.run("status", "--jsonl").stdout.splitlines()]
    table = desk.run("status", "--columns", "queue,state,lag_seconds").stdout.splitlines()

    assert [(row["group"], row["queue"], row["state"]) for row in rows] == [
        (desk.group, queue, "no standby") for queue in desk.queues
    ]
    assert all(row["at"].endswith("Z") for row in rows)
    assert table[1].split() == ["QUEUE", "STATE", "LAG"]
    assert table[2].split() == [desk.queues[0], "no", "standby", "3.0s"]


WRONG = [
    (("status", "--check", "--max-lag", "5x"), "'5x' is not a duration"),
    (("status", "--max-lag", "5m"), "add --check"),
    (("status", "--columns", "laag_seconds"), "did you mean 'lag_seconds'"),
    (("status", "--watch", "--check"), "leave out --watch"),
    (("status", "--json", "--jsonl"), "exclude each other"),
    (("describe", "GROUP/2"), "has the shards 0 to 1"),
    (("describe", "GROUP.999"), "has the shards 0 to 1"),
    (("describe", "GROUP"), "name a shard of it, as GROUP/0"),
    (("describe", "GROUP/x"), "is no shard of 'GROUP'; name one as GROUP/0"),
    (("describe", "GROUPx/0"), "did you mean 'GROUP'"),
]


def test_wrong_usage_is_one_line_and_exit_code_2(desk):
    desk.declare()
    for arguments, why in WRONG:
        done = desk.run(*(argument.replace("GROUP", desk.group) for argument in arguments))

        assert (done.exit_code, done.stdout) == (2, ""), arguments
        assert why.replace("GROUP", desk.group) in done.stderr
        assert done.stderr.count("\n") == 1


def test_describe_of_a_group_that_is_not_declared_or_a_broker_out_of_reach(desk):
    undeclared = desk.run("describe", f"{desk.group}/0")
    unreachable = desk.run("describe", f"{desk.group}/0", url="amqp://guest:hunter2@127.0.0.1:1//")

    assert (undeclared.exit_code, undeclared.stdout) == (1, "")
    assert "not declared" in undeclared.stderr
    assert (unreachable.exit_code, unreachable.stdout) == (69, "")


def test_describe_tells_what_happened_and_what_to_do(desk):
    # Given a shard with a history, and another that somebody failed in, too
    desk.declare()
    mine = {"queue": desk.queues[1], "owner": "a@h"}
    desk.write(
        Handover(desk.queues[1], owner="a@h", change="taken").as_dict(),
        TaskFailed(**mine, task_id="t-1", task="shop.pay", error="KeyError").as_dict(),
        TaskFailed(desk.queues[0], owner="a@h", task_id="t-2", task="shop.pay", error="OSError").as_dict(),
        DeadLettered(**mine, task_id="t-3", task="shop.pay", reason="lost 5 times", attempts=5).as_dict(),
    )
    desk.say("a@h", 0, 1, lag=3.0)
    # When it is described
    text = desk.run("describe", f"{desk.group}.001")
    found = json.loads(desk.run("describe", f"{desk.group}/1", "--json").stdout)
    # Then it says so
    assert text.exit_code == 0
    for words in (
        "no standby: its owner is its only consumer",
        "start one more worker",
        "2 failed",
        "3m20s",
        "taken by a@h",
    ):
        assert words in text.stdout
    assert "shop.pay[t-1]  KeyError" in text.stdout
    assert "t-2" not in text.stdout
    assert "without sharding_management_url" in text.stderr
    assert [each["task_id"] for each in found["recent"]["dead_letters"]] == ["t-3"]
    assert (found["state"], found["generation"], found["consumers"]) == ("no standby", 1, None)


def test_the_management_api_shows_who_is_connected_and_what_the_broker_counts(desk, management_url, connection):
    # Given an owner, and a standby, of which the journal says nothing
    desk.declare()
    queue = desk.queues[0]
    with Connection(desk.broker_url) as owner, Connection(desk.broker_url) as standby:
        for each, name in ((owner, "w1@h"), (standby, "w2@h")):
            each.channel().basic_consume(queue, consumer_tag=name, callback=lambda message: None)
        with brief_channel(connection) as channel:
            for _ in range(3):
                append(channel, queue, {"event": "x"})
        # When the broker has counted them, which takes it seconds
        rows: list[dict[str, Any]] = []

        def is_counted() -> bool:
            done = desk.run("status", "--jsonl", management=management_url)
            rows[:] = [json.loads(line) for line in done.stdout.splitlines()]
            return rows[0]["unacknowledged"] == 3

        assert wait_until(is_counted, timeout_seconds=30), rows
        # Then its word is shown, where no worker says anything
        assert rows[0]["held"] is None
        assert rows[0]["broker"]["leader"] in rows[0]["broker"]["online"]
        # And describe names the consumers, once the broker has told them
        found: dict[str, Any] = {}

        def are_told() -> bool:
            done = desk.run("describe", f"{desk.group}/0", "--json", management=management_url)
            assert (done.exit_code, done.stderr) == (0, "")
            found.update(json.loads(done.stdout))
            return len([each for each in found["consumers"] if each["client"]]) == 2

        assert wait_until(are_told, timeout_seconds=30), found
        told = [(each["worker"], each["active"], each["client"].split(":")[0]) for each in found["consumers"]]
        assert told == [("w1@h", True, "127.0.0.1"), ("w2@h", False, "127.0.0.1")]


def test_a_management_api_that_does_not_serve_is_told_and_done_without(desk, management_url):
    desk.declare()
    desk.say("a@h", 0, 1)
    wrong_password = management_url.replace("://", "://guest:hunter2@")
    for url, why in ((wrong_password, "refuses the user or the password"), ("http://127.0.0.1:1", "cannot be reached")):
        for arguments in (("status", "--check"), ("describe", f"{desk.group}/0")):
            done = desk.run(*arguments, management=url)

            assert done.exit_code == 0
            assert "a@h" in done.stdout
            assert why in done.stderr


# --- watching --------------------------------------------------------------------------------------------------------

APP = """
import os
from celery import Celery
from celery_sharding import ShardGroup, Sharding

app = Celery("store", broker=os.environ["STORE_BROKER"])
Sharding(app, groups=[ShardGroup(os.environ["STORE_GROUP"], shards=2)])
"""


class Watching:
    """`status --watch --jsonl` in a process of its own."""

    def __init__(self, folder: Path, group: str, broker_url: str) -> None:
        (folder / "store.py").write_text(APP)
        path = python_path(folder)
        env = {**os.environ, "STORE_GROUP": group, "STORE_BROKER": broker_url, "PYTHONPATH": path}
        # What is started in the background ignores Ctrl-C, and so would what it starts.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "celery", "-A", "store"]
        command += ["shards", "status", "--watch", "--jsonl"]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.rows, self.complaints = self._lines(self.process.stdout), self._lines(self.process.stderr)

    @staticmethod
    def _lines(stream: Any) -> Queue[str]:
        lines: Queue[str] = Queue()
        threading.Thread(target=lambda: [lines.put(line) for line in stream], daemon=True).start()
        return lines

    def wait_for_row(self, **facts: object) -> dict[str, Any]:
        while True:
            row = json.loads(self.rows.get(timeout=30))
            if facts.items() <= row.items():
                return row


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def watching(desk: Desk, proxy: FaultProxy, tmp_path: Path) -> Iterator[Watching]:
    desk.declare()
    watching = Watching(tmp_path, desk.group, proxy.url)
    yield watching
    watching.process.kill()
    watching.process.wait()


def test_watch_goes_on_through_a_lost_broker_and_ends_well_at_ctrl_c(watching, desk, proxy):
    watching.wait_for_row(index=0, state="unowned")
    # When a worker takes the shard
    desk.say("a@h", 0)
    # Then that is seen without another look
    watching.wait_for_row(index=0, owner="a@h")
    # When the broker is lost
    proxy.refuse()
    # Then it says so, with the age of what it knows
    complaint = watching.complaints.get(timeout=30)
    assert complaint.startswith("not up to date: ")
    assert complaint.endswith(" old\n")
    # And goes on when it is back
    proxy.heal()
    while not watching.rows.empty():
        watching.rows.get()
    watching.wait_for_row(index=1)
    # And Ctrl-C is no error
    watching.process.send_signal(signal.SIGINT)
    assert watching.process.wait(timeout=30) == 0
