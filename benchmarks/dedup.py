"""What `@deduplicate` on Redis adds to an empty sharded task: one round trip to claim, one to commit."""

from __future__ import annotations

from benchmarks.field import open_field
from benchmarks.results import Row, Setup, compare
from benchmarks.throughput import CONCURRENCY, SHARDS, even_keys


def run(setup: Setup) -> list[Row]:
    """At most 1.25 × the time of the same task without it; both are sharded."""
    keys = even_keys(setup.scaled(6_000))
    pairs = []
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field:
        for number in range(setup.rounds):
            times = {}
            for task in ("empty", "once") if number % 2 == 0 else ("once", "empty"):
                times[task] = 1_000 / field.time_worker("sharded", task, keys, concurrency=CONCURRENCY)
            setup.say(f"dedup: without {times['empty']:.3f} ms, with {times['once']:.3f} ms a task")
            pairs.append((times["empty"], times["once"]))
    return [compare("@deduplicate on Redis, empty tasks, -c 8", pairs, unit="ms", at_most=1.25)]
