"""What keeps a worker from its shards is one good line when it starts: no plugin, too few channels, a name in use."""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_sharding.testing import RabbitNode
from celery_sharding.testing.processes import wait_until
from support.commands import run_shards
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(200)

CHANNELS = 12


@pytest.fixture(scope="module")
def bare_node() -> Iterator[RabbitNode]:
    """A broker without the consistent-hash exchange, which allows few channels."""
    node = RabbitNode(config=[f"channel_max = {CHANNELS}"])
    (node.folder / "enabled_plugins").write_text("[].\n")
    try:
        node.start()
        yield node
    finally:
        node.remove()


@pytest.fixture(scope="module")
def narrow_node() -> Iterator[RabbitNode]:
    """A broker that allows few channels on a connection."""
    with RabbitNode(config=[f"channel_max = {CHANNELS}"]) as node:
        yield node


def shop_on(node: RabbitNode, folder: Path) -> Shop:
    return Shop(f"t{uuid.uuid4().hex[:12]}", node.url, folder)


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_without_the_plugin_a_worker_ends_with_one_line(bare_node: RabbitNode, tmp_path: Path, pool: str) -> None:
    shop = shop_on(bare_node, tmp_path)
    # Given a publisher, which needs no plugin
    shop.send("step", "a", 1)
    # When a worker starts
    worker = shop.worker(*pool_options(pool, 1), wait_seconds=0)
    # Then it ends with a failure, and its log says why, without a traceback
    assert worker.wait() != 0
    [line] = [line for line in worker.output.splitlines() if "x-consistent-hash" in line]
    assert "CRITICAL" in line
    assert "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange" in line
    assert "Traceback" not in worker.output


@pytest.mark.parametrize("verb", ["declare", "doctor"])
def test_without_the_plugin_commands_say_it_in_one_line(bare_node: RabbitNode, tmp_path: Path, verb) -> None:
    shop = shop_on(bare_node, tmp_path)
    done = run_shards("shop", verb, env=shop.env)
    assert done.returncode == 1
    assert "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_too_few_channels_are_an_error_at_start_that_names_both_figures(narrow_node, tmp_path: Path, pool: str) -> None:
    shop = shop_on(narrow_node, tmp_path)
    # Given more shards than the broker allows channels, when a worker of all starts
    worker = shop.worker(*pool_options(pool, 1), wait_seconds=0, SHOP_SHARDS="12")
    # Then it ends, and says what it needs, what it is given, and what to do
    assert worker.wait() != 0
    [line] = [line for line in worker.output.splitlines() if "channel_max" in line]
    needed = re.search(r"needs (\d+) channels.*allows (\d+) per connection", line)
    assert needed is not None, line
    assert int(needed[1]) > int(needed[2]) == CHANNELS
    assert "-Q" in line
    assert "Traceback" not in worker.output
    # And the doctor finds it, before a worker starts
    done = run_shards("shop", "doctor", env={**shop.env, "SHOP_SHARDS": "12"})
    assert done.returncode == 1
    assert re.search(r"error +channels: .*channel_max", done.stdout), done.stdout
    # And with fewer shards a worker works
    for number in range(8):
        shop.send("step", f"k{number}", number)
    halves = [",".join(f"{shop.group}.{index:03d}" for index in part) for part in (range(4), range(4, 8), range(8, 12))]
    for half in halves:
        shop.worker(*pool_options(pool, 1), "-Q", half, SHOP_SHARDS="12", SHOP_PREFETCH="10")
    assert shop.trace.wait_for(8), shop.verdict()
    shop.kill_workers()


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_second_worker_of_a_name_says_who_has_it_and_goes_on_when_it_is_free(shop: Shop, pool: str) -> None:
    # Given a worker
    first = shop.worker(*pool_options(pool, 1))
    # When another is started under its name
    second = shop.worker(*pool_options(pool, 1), "-n", first.name, wait_seconds=0)
    second.wait_for("is called")
    # Then it says once who has it, and what to do
    [line] = [line for line in second.output.splitlines() if "is called" in line]
    assert f"another worker is called {first.name} as well: process {first.pid} on {os.uname().nodename}" in line
    assert "`-n w2@%h`" in line
    assert "RESOURCE_LOCKED" not in second.output
    # And when the first has gone, it works
    first.kill()
    second.wait_for(" ready.")
    shop.send("step", "a", 1)
    assert shop.trace.wait_for(1), shop.verdict()


def test_a_worker_can_be_stopped_while_it_waits_for_its_name(shop: Shop) -> None:
    first = shop.worker("-P", "solo")
    second = shop.worker("-P", "solo", "-n", first.name, wait_seconds=0)
    second.wait_for("is called")
    assert second.stop() == 0
    assert first.is_running


def test_a_restart_under_the_name_of_a_connection_that_lingers_recovers_by_itself(shop: Shop) -> None:
    # Given a worker that hangs with its connections open, as behind a dead link
    first = shop.worker("-P", "solo", SHOP_HEARTBEAT="12")
    first.signal(signal.SIGSTOP)
    # When it is started anew elsewhere
    second = shop.worker("-P", "solo", "-n", first.name, wait_seconds=0)
    # Then that says that nobody answers, and works when the broker has ended the old connection
    second.wait_for("nobody answers")
    second.wait_for(" ready.", timeout_seconds=120)
    shop.send("step", "a", 1)
    assert wait_until(lambda: shop.trace.count() == 1, timeout_seconds=60), shop.verdict()


@pytest.mark.parametrize("pool", pools("prefork", "threads", slow=("solo",)))
def test_a_shard_that_there_is_not_ends_the_worker_with_one_line(shop: Shop, pool: str) -> None:
    # When a worker is to consume a shard that the group does not have
    worker = shop.worker(*pool_options(pool, 1), "-Q", f"{shop.group}.099", wait_seconds=0)
    # Then it ends with a failure, and the line that says why is no traceback's last
    assert worker.wait() != 0
    [line] = [line for line in worker.output.splitlines() if "does not start" in line]
    assert "has the shards 0 to" in line
    assert "Traceback" not in worker.output
