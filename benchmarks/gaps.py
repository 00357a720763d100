"""How long a key waits when its owner is killed, or hands over, and when the broker restarts.

One key is published to all the time, with two workers of its group. The gap is the longest time between the ends of two
tasks around the fault; for a restart of the broker, the time from when it answers again to the end of a task.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from celery import Celery
from kombu import Connection

from benchmarks.field import Field, open_field, read_ends
from benchmarks.results import Row, Setup, limit
from celery_sharding import Sharding
from celery_sharding.errors import ShardingError
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.testing import ServerNotReady, WorkerNode
from celery_sharding.testing.processes import wait_until

KEY, SHARDS = "one", 2
PAUSE_SECONDS = 0.01
PATIENCE_SECONDS = 60.0
# Tasks that must have ended after the fault before the gap is looked for.
AFTERWARDS = 30


def run(setup: Setup) -> list[Row]:
    """SIGKILL of the owner: at most 1 s; a warm stop: 0.2 s; a restart of the broker: 5 s after it is back."""
    restart = os.environ.get("SHARDING_TEST_BROKER_RESTART")
    faults: list[tuple[str, float, Callable[[WorkerNode], float | None]]] = [
        ("owner killed, gap of a key", 1.0, kill_owner),
        ("owner stopped warm, gap of a key", 0.2, stop_owner),
    ]
    if restart:
        faults.append(("broker restarted, gap after it is back", 5.0, lambda owner: restart_broker(restart)))
    rows = []
    for name, at_most, fault in faults:
        gaps = [measure_gap(setup, fault) for _ in range(min(3, setup.rounds))]
        setup.say(f"{name}: {', '.join(f'{gap:.2f}' for gap in gaps)} s")
        rows.append(limit(name, None, statistics.median(gaps), unit="s", at_most=at_most))
    return rows


def measure_gap(setup: Setup, fault: Callable[[WorkerNode], float | None]) -> float:
    """Start two workers, publish, let `fault` happen to the key's owner, and return the gap in seconds."""
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field, ExitStack() as stack:
        workers = [stack.enter_context(field.worker("sharded", concurrency=2)) for _ in range(2)]
        stack.enter_context(publishing(field))
        files = [ends for _, ends in workers]
        expect(lambda: count(files) > 100, "the workers run nothing")
        expect(lambda: is_settled(field), "the shards are not shared out")
        owner = next(node for node, ends in workers if is_written(ends))
        started = time.monotonic()
        back = fault(owner)
        ended = time.monotonic()
        expect(lambda: sum(at > ended for at in all_ends(files)) > AFTERWARDS, "nothing runs after the fault")
        ends = all_ends(files)
        if back is not None:
            return next(at for at in ends if at > back) - back
        around = [at for at in ends if at > started - 0.5]
        return max(later - earlier for earlier, later in pairwise(around))


def kill_owner(owner: WorkerNode) -> None:
    """Kill the owner and its pool."""
    owner.kill()


def stop_owner(owner: WorkerNode) -> None:
    """Stop the owner warm."""
    owner.stop()


def restart_broker(command: str) -> float:
    """Restart the broker; return when it answered again."""
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic()


@contextmanager
def publishing(field: Field) -> Iterator[None]:
    """Publish to the key until the block ends; what the broker does not take is passed over."""
    app = Celery("publisher", broker=field.broker_url, set_as_current=False)
    app.conf.update(
        sharding_routes={"benchmarks.shop.*": {"group": field.name, "key": "key"}}, sharding_publish_timeout_seconds=2
    )
    Sharding(app, groups=[field.group])
    is_over = threading.Event()

    def publish() -> None:
        number = 0
        while not is_over.wait(PAUSE_SECONDS):
            number += 1
            try:
                app.send_task("benchmarks.shop.empty", kwargs={"key": KEY, "number": number}, ignore_result=True)
            except ShardingError:
                continue

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def is_settled(field: Field) -> bool:
    """Say whether each worker owns a shard."""
    with Connection(field.broker_url) as connection:
        rows = read_snapshot(connection, [field.name]).groups[0].shards
    return len({row.owner for row in rows}) == SHARDS and all(row.owner and row.standbys for row in rows)


def is_written(ends: Path) -> bool:
    """Say whether the worker of this file ends tasks at the moment."""
    before = count([ends])
    return wait_until(lambda: count([ends]) > before, timeout_seconds=2)


def count(files: list[Path]) -> int:
    return len(all_ends(files))


def all_ends(files: list[Path]) -> list[float]:
    """Return when tasks ended, in all workers, in order."""
    return sorted(at for ends in files for at in read_ends(ends))


def expect(condition: Callable[[], bool], otherwise: str) -> None:
    if not wait_until(condition, timeout_seconds=PATIENCE_SECONDS):
        raise ServerNotReady(otherwise)
