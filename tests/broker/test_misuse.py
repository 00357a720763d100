"""What is nearly right, and would run unordered without a word: said once, when a worker starts or a command looks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from kombu import Connection

from celery_sharding.layout.cleanup import delete_group
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import wait_until
from support.commands import run_shards
from support.paths import python_path
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(150)

APP = """
import os
from celery import Celery, shared_task
from celery_sharding import ShardGroup, Sharding, deduplicate

app = Celery("misused", broker=os.environ["BROKER"], backend="cache+memory://")
app.conf.task_default_queue = os.environ["GROUP"] + "-plain"

def print_it(order_id):
    print(order_id)

{lines}
@app.task(name="pay")
def pay(order_id):
    return order_id
"""
SHARDING = 'Sharding(app, groups=[ShardGroup(os.environ["GROUP"], shards=2)])\n'


class Project:
    """A module with an app, for commands and workers."""

    def __init__(self, folder: Path, group: str, broker_url: str) -> None:
        self.folder = folder
        self.group = group
        path = python_path(folder)
        self.env = {"BROKER": broker_url, "GROUP": group, "PYTHONPATH": path}
        self.workers: list[WorkerNode] = []

    def write(self, lines: str) -> None:
        (self.folder / "misused.py").write_text(APP.format(lines=lines))

    def worker(self, *arguments: str, wait_seconds: float = 40.0) -> WorkerNode:
        name = f"w-{uuid.uuid4().hex[:6]}@test"
        node = WorkerNode("misused", name, arguments or ("-P", "solo"), env=self.env, folder=self.folder)
        self.workers.append(node)
        return node.start(wait_seconds=wait_seconds)

    def shards(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_shards("misused", *arguments, env=self.env)

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **self.env},
            text=True,
            capture_output=True,
            check=False,
            timeout=100,
        )


@pytest.fixture
def project(tmp_path: Path, group_name: str, broker_url: str) -> Iterator[Project]:
    project = Project(tmp_path, group_name, broker_url)
    yield project
    for worker in project.workers:
        worker.kill()
    with Connection(broker_url) as connection:
        delete_group(connection, group_name)
        connection.channel().queue_delete(f"{group_name}-plain")


def count(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text))


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_route_to_no_task_and_a_setting_outside_its_namespace_are_said_once_by_a_worker(project, pool) -> None:
    # Given an app whose route names a task that is not there, and settings that look like ours
    project.write(
        SHARDING
        + 'app.conf.sharding_routes = {"payy": {"group": os.environ["GROUP"], "key": "order_id"}}\n'
        + 'app.conf.SHARDING_GROUPS = {"mail": {"shards": 1}}\n'
    )
    # When a worker starts, then its log has a line of each, with what may be meant
    worker = project.worker(*pool_options(pool, 1))
    assert count(worker.output, r"sharding_routes\['payy'\] fits no task .*did you mean 'pay'") == 1
    assert count(worker.output, r"'SHARDING_GROUPS' is unknown .*did you mean 'sharding_groups'") == 1
    # And so have the commands, which do their work
    listed, examined = project.shards("list"), project.shards("doctor")
    for text in (listed.stderr, examined.stdout):
        assert "fits no task" in text
        assert "SHARDING_GROUPS" in text
    assert listed.returncode == 0
    assert project.group in listed.stdout


def test_a_worker_of_other_groups_does_not_know_their_tasks(project: Project) -> None:
    # Given a route of a group that this worker does not consume, when it starts, then it says nothing of it
    project.write(SHARDING + 'app.conf.sharding_routes = {"elsewhere.*": {"group": os.environ["GROUP"]}}\n')
    worker = project.worker("-P", "solo", "-X", project.group)
    assert "elsewhere" not in worker.output


@pytest.mark.parametrize(
    ("lines", "meant"),
    [
        ("app.conf.sharding_route = {}\n", "sharding_routes"),
        ('app.conf.shard_groups = {"mail": {"shards": 1}}\n', "sharding_groups"),
        ('lost = app.task(name="lost", shard_grop="orders")(print_it)\n', "shard_group"),
        ('lost = app.task(name="lost", shardkey="order_id")(print_it)\n', "shard_key"),
    ],
)
def test_a_misspelt_setting_or_option_stops_workers_publishers_and_commands(project, lines, meant) -> None:
    # Given an app that says something nearly right
    project.write(SHARDING + lines)
    # Then nobody starts: neither a worker, nor a publisher of that task, nor a command
    worker = project.worker("-P", "solo", wait_seconds=0)
    assert worker.wait() != 0
    published = project.run('import misused\nmisused.app.tasks.get("lost", misused.pay).delay(1)')
    for code, text in (
        (1, worker.output),
        (published.returncode, published.stderr),
        *((done.returncode, done.stderr) for done in (project.shards("list"), project.shards("doctor"))),
    ):
        assert code != 0
        assert f"did you mean '{meant}'" in text


def test_a_worker_whose_app_lacks_sharding_says_so(project: Project) -> None:
    # Given an app that has forgotten Sharding(app)
    project.write('lost = app.task(name="lost", shard_group="orders", shard_key="order_id")(print_it)\n')
    # When a worker starts, then it says which tasks will run in no order, and the command line that there is nothing
    worker = project.worker("-P", "solo")
    assert count(worker.output, r"have a shard_group, but app 'misused' has no Sharding\(app\).*: lost\.") == 1
    assert "Sharding(app" in project.shards("list").stderr


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_sharded_task_that_came_by_an_ordinary_queue_runs_and_is_told_once(shop: Shop, pool: str) -> None:
    # Given a worker, and a publisher without Sharding(app)
    worker = shop.worker(*pool_options(pool))
    plain = Celery("plain", broker=shop.broker_url, set_as_current=False)
    # When it sends a sharded task several times
    for number in range(3):
        plain.send_task("shop.step", kwargs={"key": "a", "number": number}, queue=f"{shop.group}-plain")
    # Then they run, and the worker says once where they came from
    assert shop.trace.wait_for(3)
    assert wait_until(lambda: "came by the ordinary queue" in worker.output, timeout_seconds=10)
    [line] = [line for line in worker.output.splitlines() if "came by the ordinary queue" in line]
    assert f"{shop.group}-plain, sent by gen{os.getpid()}@" in line
    assert f"task shop.step belongs to the shard group {shop.group}" in line


@pytest.mark.parametrize("option", ["-Q", "-X"])
def test_a_near_miss_of_a_group_is_in_the_log_of_the_worker_once(shop: Shop, option: str) -> None:
    # Given a name that is nearly a group's, and a log in a file
    log = shop.folder / "worker.log"
    worker = shop.worker("-P", "solo", option, f"{shop.group}x", "-f", str(log), wait_seconds=0)
    # Then it stands in the log, once, and nowhere else
    assert wait_until(lambda: log.exists() and " ready." in log.read_text(), timeout_seconds=40), worker.output
    found = f"{option} {shop.group}x names no shard group"
    assert (count(log.read_text(), found), count(worker.output, found)) == (1, 0)
    assert f"did you mean '{shop.group}'" in log.read_text()
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(f"{shop.group}x")
        connection.channel().exchange_delete(f"{shop.group}x")
