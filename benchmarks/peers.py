"""What a killed worker leaves of each way to run a task once: celery-singleton, celery-once, and `@deduplicate`.

The same stream for each: of five events one is sent a second time, up to 200 events later. The task writes a row and
takes 10 ms. In the middle the worker is killed with SIGKILL and started again. What then has no row is sent once more,
as whoever finds it missing would: `blocked` is what still has none, because a lock was left behind.

With `@deduplicate` the row and the claim are one transaction. The events go to one ordinary queue: it is deduplication
that is compared, not order.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kombu import Connection

from benchmarks.results import Row, Setup
from celery_sharding.testing import ServerNotReady, WorkerNode
from celery_sharding.testing.processes import wait_until

CASES = (
    ("Celery alone", "late"),
    ("celery-singleton", "early"),
    ("celery-singleton", "late"),
    ("celery-once", "early"),
    ("celery-once", "late"),
    ("@deduplicate", "late"),
)
PACE_SECONDS, QUIET_SECONDS, SEED = 0.004, 8.0, 20


def run(setup: Setup) -> list[Row]:
    """No ratio: what each lets through twice, and what each loses."""
    events = stream(setup.scaled(1_500))
    keys = set(events)
    setup.say(f"peers: {len(events):,} events, {len(keys):,} of them different, -c 4, killed in the middle")
    setup.say(f"{'':18}{'acks':>6}{'twice':>8}{'lost':>6}{'blocked':>9}")
    for side, acks in CASES:
        rows, again = measure(setup, side, acks, events)
        twice = sum(count - 1 for count in rows.values())
        setup.say(f"{side:18}{acks:>6}{twice:>8}{len(keys - set(rows)):>6}{len(keys - again):>9}")
    return []


def stream(count: int) -> list[str]:
    """Return `count` events as their keys, one in five a second time."""
    chance = random.Random(SEED)
    distinct = count * 4 // 5
    places = [(float(number), f"event-{number}") for number in range(distinct)]
    twice = chance.sample(range(distinct), count - distinct)
    places += [(number + chance.uniform(0, 200), f"event-{number}") for number in twice]
    return [key for _, key in sorted(places)]


def measure(setup: Setup, side: str, acks: str, events: list[str]) -> tuple[Counter[str], set[str]]:
    """Return how many rows each key has after the kill, and which keys have one when the missing were sent again."""
    name = f"peers-{uuid.uuid4().hex[:8]}"
    folder = setup.folder / name
    folder.mkdir()
    env = {
        "BENCH_SIDE": side,
        "BENCH_ACKS": acks,
        "BENCH_QUEUE": name,
        "BENCH_FOLDER": str(folder),
        "BENCH_BROKER": setup.broker_url,
        "BENCH_BACKEND": setup.redis_url,
    }
    forget_locks(setup.redis_url)
    publish(env, [])
    options = ["-l", "warning", "-c", "4", "--without-mingle", "--without-gossip", "--without-heartbeat"]
    node = WorkerNode("benchmarks.peers_shop", f"{name}@bench", options, env=env, folder=folder)
    node.start(wait_seconds=0)
    try:
        publisher = publishing(env, events)
        if not wait_until(lambda: len(written(folder)) > len(events) // 3, timeout_seconds=120):
            raise ServerNotReady(f"{side}: nothing ran; see {node.log}")
        node.kill()
        node.start(wait_seconds=0)
        if publisher.wait(timeout=300):
            raise ServerNotReady(f"{side}: its publisher failed")
        await_quiet(setup, name, folder)
        rows = written(folder)
        publish(env, sorted(set(events) - set(rows)))
        await_quiet(setup, name, folder)
        return rows, set(written(folder))
    finally:
        node.kill()
        with Connection(setup.broker_url) as connection:
            connection.default_channel.queue_delete(name)


def publishing(env: dict[str, str], keys: Iterable[str]) -> subprocess.Popen[str]:
    """Send the keys, one every 4 ms, from a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers"], env=os.environ | env, stdin=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write("\n".join(keys))
    process.stdin.close()
    return process


def publish(env: dict[str, str], keys: Iterable[str]) -> None:
    if publishing(env, keys).wait(timeout=300):
        raise ServerNotReady("the publisher failed")


def await_quiet(setup: Setup, queue: str, folder: Path) -> None:
    """Return when nothing waits and nothing has been written for longer than a lease."""
    since, last = time.monotonic(), -1

    def is_quiet() -> bool:
        nonlocal since, last
        time.sleep(0.5)
        with Connection(setup.broker_url) as connection:
            waiting = connection.default_channel.queue_declare(queue, passive=True).message_count
        now = sum(written(folder).values())
        if waiting or now != last:
            since, last = time.monotonic(), now
        return time.monotonic() - since > QUIET_SECONDS

    if not wait_until(is_quiet, timeout_seconds=300):
        raise ServerNotReady(f"{queue} does not come to an end")


def written(folder: Path) -> Counter[str]:
    with sqlite3.connect(folder / "effects.db", timeout=60) as connection:
        return Counter(key for (key,) in connection.execute("SELECT key FROM effects"))


def forget_locks(redis_url: str) -> None:
    """Delete what the side before left: the locks of a task of the same name."""
    from redis import Redis

    with Redis.from_url(redis_url) as client:
        for pattern in ("SINGLETONLOCK_*", "qo_*", "celery-sharding:dedup:pay:*"):
            for key in client.scan_iter(pattern, count=1_000):
                client.delete(key)


def main() -> None:
    from benchmarks.peers_shop import make_tables, pay

    make_tables()
    for key in sys.stdin.read().split():
        pay.apply_async((key,))
        time.sleep(PACE_SECONDS)


if __name__ == "__main__":
    main()
