"""Publishing from forks, from green threads, and from programs that end: each case is a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from amqp import Message
from kombu import Connection

from celery_sharding.testing import FaultProxy
from celery_sharding.topology import Names
from support.paths import APPS

pytestmark = pytest.mark.timeout(90)

PREAMBLE = """
import os, sys
from celery import Celery
from celery_sharding import ShardGroup, Sharding
url, group = sys.argv[1:]
app = Celery("forks", broker=url)
Sharding(app, groups=[ShardGroup(group, shards=2)])

@app.task(shard_group=group, shard_key="key", name="step")
def step(key, number):
    pass

def ports():
    links = app.sharding.backing()._publisher._links
    return {link.connection.sock.getsockname()[1] for link in links}
"""


def run(script: str, broker_url: str, group: str) -> None:
    """Run `script` behind the preamble, with every warning and error told."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", "-W", "ignore::DeprecationWarning", "-c",
         PREAMBLE + script, broker_url, group],
        check=False, timeout=60, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def stored(broker_url: str, group: str) -> list[tuple[str, int]]:
    """Take what the group's first limbo holds, in order."""
    found: list[Message] = []
    limbo = Names(group).limbo(1)
    with Connection(broker_url) as connection:
        channel = connection.channel()
        channel.basic_publish(Message("end", type="end"), routing_key=limbo)
        channel.basic_consume(limbo, callback=found.append, no_ack=True)
        while not found or found[-1].properties.get("type") != "end":
            connection.drain_events(timeout=20)
    bodies = [channel.message_to_python(message).decode() for message in found[:-1]]
    return [(args[0], args[1]) for args, _, _ in bodies]


def test_parent_and_child_of_a_fork_both_publish_on_connections_of_their_own(broker_url: str, group_name: str) -> None:
    # Given a process that has published, forks, and goes on while its child does
    script = """
step.delay("parent", 0)
before = ports()
child = os.fork()
if child == 0:
    step.delay("child", 0)
    step.delay("child", 1)
    os._exit(0 if not ports() & before else 3)
step.delay("parent", 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
step.delay("parent", 2)
assert ports() == before  # the parent's connection is unharmed
"""
    # When both are done
    run(script, broker_url, group_name)
    # Then all of it is there, in order
    found = stored(broker_url, group_name)
    assert [number for key, number in found if key == "parent"] == [0, 1, 2]
    assert [number for key, number in found if key == "child"] == [0, 1]


@pytest.mark.parametrize(
    "ending", ["os._exit(0)", "sys.exit(0)", "del app, step; import gc; gc.collect(); sys.exit(0)"]
)
def test_a_child_that_never_publishes_ends_without_harm_to_its_parent(
    broker_url: str, group_name: str, ending: str
) -> None:
    script = f"""
step.delay("a", 0)
before = ports()
child = os.fork()
if child == 0:
    {ending}
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
step.delay("a", 1)
assert ports() == before
"""
    run(script, broker_url, group_name)

    assert stored(broker_url, group_name) == [("a", 0), ("a", 1)]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_publish(broker_url: str, group_name: str, method: str, tmp_path) -> None:
    # Given a pool of either kind, made after the first publish
    program = tmp_path / "program.py"
    body = f"""
import multiprocessing

def work(number):
    step.delay(f"k{{number % 4}}", number)

if __name__ == "__main__":
    step.delay("first", 0)
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        pool.map(work, range(20), chunksize=1)
    step.delay("last", 0)
"""
    program.write_text(PREAMBLE + body)
    # When its children publish
    done = subprocess.run([sys.executable, program, broker_url, group_name], check=False, timeout=60)
    # Then all of it is there
    assert done.returncode == 0
    found = stored(broker_url, group_name)
    assert sorted(number for key, number in found if key.startswith("k")) == list(range(20))
    assert found[0] == ("first", 0)
    assert found[-1] == ("last", 0)


def test_a_fork_between_the_publishes_of_other_threads_leaves_both_sides_whole(
    broker_url: str, group_name: str
) -> None:
    # Given threads with links of their own, in a process that forks while they pause. (A fork in the middle of what
    # another thread does copies whatever lock that thread holds, in Celery, kombu or the import system, for ever.)
    script = """
import threading
pause, go_on = threading.Barrier(5), threading.Event()
def publish_many(key, numbers):
    for number in numbers:
        step.delay(key, number)
def publish_twice(key):
    publish_many(key, range(30))
    pause.wait()
    go_on.wait()
    publish_many(key, range(30, 60))
threads = [threading.Thread(target=publish_twice, args=(f"t{index}",)) for index in range(4)]
for thread in threads:
    thread.start()
pause.wait()
children = []
for index in range(5):
    child = os.fork()
    if child == 0:
        publish_many(f"c{index}", range(3))
        os._exit(0)
    children.append(child)
    step.delay("main", index)
go_on.set()
for thread in threads:
    thread.join()
assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
"""
    run(script, broker_url, group_name)
    # Then nothing is lost, doubled or out of order
    found = stored(broker_url, group_name)
    for keys, count in (([f"t{index}" for index in range(4)], 60), ([f"c{index}" for index in range(5)], 3)):
        for key in keys:
            assert [number for name, number in found if name == key] == list(range(count))


def test_green_threads_publish_at_once(broker_url: str, group_name: str) -> None:
    # Given a process in which gevent has replaced sockets and threads, and a clock among its green threads
    script = """
import gevent
ticks = 0
def tick():
    global ticks
    while True:
        gevent.sleep(0.001)
        ticks += 1
def publish(index):
    for number in range(20):
        step.delay(f"k{index}", number)
clock = gevent.spawn(tick)
step.delay("first", 0)
gevent.joinall([gevent.spawn(publish, index) for index in range(8)], raise_error=True)
assert ticks > 10  # publishing waits without holding the others up
with gevent.Timeout(5):
    step.delay("last", 0)
clock.kill()
"""
    run_green = "from gevent import monkey; monkey.patch_all()\n" + PREAMBLE + script
    done = subprocess.run(
        [sys.executable, "-c", run_green, broker_url, group_name],
        check=False, timeout=60, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    # Then all of it is there, each key in order
    found = stored(broker_url, group_name)
    for index in range(8):
        assert [number for key, number in found if key == f"k{index}"] == list(range(20))


def test_a_program_may_end_right_after_a_publish(broker_url: str, group_name: str) -> None:
    run('step.delay("a", 0)\n', broker_url, group_name)
    run('step.delay("a", 1)\nos._exit(0)\n', broker_url, group_name)

    assert stored(broker_url, group_name) == [("a", 0), ("a", 1)]


@pytest.mark.parametrize("library", ["none", "gevent", "eventlet"])
def test_a_publisher_keeps_its_connection_whatever_replaces_pythons_sockets(
    group_name: str, broker_url: str, library: str
) -> None:
    # Given a group that is there
    command = [sys.executable, str(APPS / "patched_publisher.py"), library]
    subprocess.run([*command, broker_url, group_name, "1"], check=True, timeout=60)
    # When a process publishes many messages
    with FaultProxy(broker_url) as proxy:
        subprocess.run([*command, proxy.url, group_name, "50"], check=True, timeout=60)
        # Then all went over one connection
        assert proxy.taken_connections == 1
