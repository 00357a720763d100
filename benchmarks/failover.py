"""How long keys stand still when the node that leads all their queues is killed: `python -m benchmarks.failover`.

Not part of `make bench`, since stock Celery has nothing to compare it with, and it needs a cluster of its own. A key is
published to every few milliseconds all the time; its gap is the longest time between two starts of its tasks after the
kill. The longest publish, confirmed or not, shows how much of it the publisher waited for.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import click
from celery import Celery

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import PublishError
from celery_sharding.testing import RabbitCluster, Trace, WorkerNode
from celery_sharding.topology import Names

GROUP, SHARDS, KEYS, THREADS = "failover", 4, 12, 4
PAUSE_SECONDS = 0.01
LEAD_MESSAGES, WATCH_MESSAGES = 200, 600

# The same module is the app of the workers.
app = Celery(GROUP, broker=os.environ.get("BENCH_BROKER", "amqp://"))
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
Sharding(app, groups=[ShardGroup(GROUP, shards=SHARDS)])


@app.task(name="failover.step", shard_group=GROUP, shard_key="key")
def step(key: str, number: int) -> None:
    with Trace(os.environ["BENCH_TRACE"]).run(key, number):
        pass


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=3)
def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="sharding-failover-") as name, RabbitCluster() as cluster:
        app.conf.broker_url = cluster.url
        folder = Path(name)
        trace = Trace(folder / "trace")
        env = {"BENCH_BROKER": cluster.url, "BENCH_TRACE": str(trace.path)}
        arguments = ("-c", "2", "-Q", GROUP)
        with (
            WorkerNode("benchmarks.failover", "w1@bench", arguments, env=env, folder=folder),
            WorkerNode("benchmarks.failover", "w2@bench", arguments, env=env, folder=folder),
        ):
            for number in range(1, rounds + 1):
                click.echo(f"round {number}: {kill_the_leader(cluster, trace)}")


def kill_the_leader(cluster: RabbitCluster, trace: Trace) -> str:
    """Kill the node that leads the first shard under a stream of messages, start it again, and say what it cost."""
    ended, waits = threading.Event(), list[float]()
    done = trace.count()
    threads = [threading.Thread(target=publish, args=(index, done, ended, waits)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    trace.wait_for(done + LEAD_MESSAGES)
    leader = cluster.leader_of(Names(GROUP).shard(1, 0)) or cluster.nodes[0]
    killed_at = time.time()
    leader.kill()
    trace.wait_for(trace.count() + WATCH_MESSAGES, timeout_seconds=120)
    ended.set()
    for thread in threads:
        thread.join()
    leader.start()
    gaps = longest_gaps(trace, since=killed_at)
    return (
        f"{len(gaps)} keys stood still for {statistics.median(gaps):.2f} s (median), {max(gaps):.2f} s at most; "
        f"the longest publish took {max(waits):.2f} s"
    )


def publish(index: int, first: int, ended: threading.Event, waits: list[float]) -> None:
    """Publish to the keys of one thread until told to stop, and note how long each publish took."""
    number = first
    while not ended.wait(PAUSE_SECONDS):
        number += 1
        started = time.monotonic()
        try:
            step.delay(f"k{index}.{number % (KEYS // THREADS)}", number)
        except PublishError as exc:
            click.echo(f"  {type(exc).__name__} after {time.monotonic() - started:.2f} s", err=True)
        waits.append(time.monotonic() - started)


def longest_gaps(trace: Trace, *, since: float) -> list[float]:
    """Return the longest time between two starts of each key, from `since` (epoch seconds) on."""
    starts: dict[str, list[float]] = {}
    for mark in trace.read():
        if mark.kind == "start" and mark.at >= since - 1.0:
            starts.setdefault(mark.key, []).append(mark.at)
    return [max(later - earlier for earlier, later in pairwise(times)) for times in starts.values() if len(times) > 1]


if __name__ == "__main__":
    main()
