"""What `@deduplicate` on Redis adds to an empty sharded task: one round trip to claim, one to commit."""

from __future__ import annotations

from benchmarks.field import Field, open_field
from benchmarks.results import Row, Setup, compare
from benchmarks.throughput import CONCURRENCY, SHARDS, even_keys


def run(setup: Setup) -> list[Row]:
    """At most 1.25 × the time of the same task without it; both are sharded.

    Also where both store their results, which is Celery's default.
    """
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field:
        pairs = take_turns(setup, field, ignore_result=True)
        storing = take_turns(setup, field, ignore_result=False)
    name = "@deduplicate on Redis, empty tasks, -c 8"
    return [
        compare(name, pairs, unit="ms", at_most=1.25),
        compare(f"{name}, results stored", storing, unit="ms", at_most=1.25),
    ]


def take_turns(setup: Setup, field: Field, *, ignore_result: bool) -> list[tuple[float, float]]:
    """Return the time of a task without and with `@deduplicate` in each round, in milliseconds."""
    keys = even_keys(setup.scaled(6_000))
    pairs = []
    for number in range(setup.rounds):
        times = {}
        for task in ("empty", "once") if number % 2 == 0 else ("once", "empty"):
            rate = field.time_worker("sharded", task, keys, concurrency=CONCURRENCY, ignore_result=ignore_result)
            times[task] = 1_000 / rate
        setup.say(f"dedup: without {times['empty']:.3f} ms, with {times['once']:.3f} ms a task")
        pairs.append((times["empty"], times["once"]))
    return pairs
