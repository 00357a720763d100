"""How late what waits for its moment begins: a rate limit, and the countdown of a retry, on an idle and a busy worker.

A retry notes how much later than it asked for it begins; on a busy worker another key runs all the time, and leaves
processes free. A rate limit is measured by how long fifteen tasks of fifteen keys take that come at once to an idle
worker, from the first end to the last.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import RATE_LIMIT
from benchmarks.field import SIDES, Field, count_ends, open_field, read_ends
from benchmarks.results import Row, Setup, compare, limit
from celery_sharding.testing import ServerNotReady
from celery_sharding.testing.processes import wait_until

TASKS = 15
CONCURRENCY = 4
# Fewer than there are processes: how late a retry is that has a process to begin in.
RETRIES = 3
# Of one key, 10 ms each.
BUSY_TASKS = 500
LATE_MS_MAX = 50
PATIENCE_SECONDS = 90.0


def run(setup: Setup) -> list[Row]:
    """A rate limit takes at most 1.05 × as long as stock, and a retry is at most 50 ms late."""
    keys = [f"k{number}" for number in range(TASKS)]
    limited: list[tuple[float, ...]] = []
    idle: list[tuple[float, ...]] = []
    busy: list[float] = []
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=4) as field:
        for number in range(1, setup.rounds + 1):
            limited.append(tuple(spread(run_tasks(field, side, "limited", keys)) for side in SIDES))
            idle.append(tuple(statistics.median(run_tasks(field, side, "late", keys[:RETRIES])) for side in SIDES))
            busy.append(statistics.median(run_tasks(field, "sharded", "late", keys[:RETRIES], beside=BUSY_TASKS)))
            setup.say(f"timers, round {number}: limited {limited[-1]} s, late {idle[-1]} s, busy {busy[-1]} s")
    stock_late, late = (1_000 * statistics.median(values) for values in zip(*idle, strict=True))
    setup.say(f"a stock retry begins {stock_late:.0f} ms late")
    return [
        compare(
            f"{TASKS} tasks of {RATE_LIMIT}/s, as many keys, idle",
            [(stock, ours) for stock, ours in limited],
            unit="s",
            at_most=1.05,
        ),
        limit("retry begins late, idle", None, late, unit="ms", at_most=LATE_MS_MAX),
        limit("retry begins late, busy", None, 1_000 * statistics.median(busy), unit="ms", at_most=LATE_MS_MAX),
    ]


def spread(ends: list[float]) -> float:
    return max(ends) - min(ends)


def run_tasks(field: Field, side: str, task: str, keys: list[str], *, beside: int = 0) -> list[float]:
    """Give tasks to a new worker that is idle, or has others beside them, and return what they noted."""
    with field.worker(side, concurrency=CONCURRENCY) as (node, ends):
        field.fill(side, "empty", ["first"])
        expect(ends, 1, side)
        if beside:
            field.fill(side, "brief", ["other"] * beside)
        field.fill(side, task, keys)
        expect(ends, 1 + beside + len(keys), side)
        noted = read_ends(ends)[1:]
        node.stop()
    # What others note are moments of the machine's clock, in seconds since it was started.
    return sorted(noted)[: len(keys)] if task == "late" else noted


def expect(ends: Path, count: int, side: str) -> None:
    if not wait_until(lambda: count_ends(ends) >= count, timeout_seconds=PATIENCE_SECONDS):
        raise ServerNotReady(f"{side}: {count_ends(ends)} tasks ended, not {count}")
