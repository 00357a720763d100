"""One key alone, empty tasks: what a lane costs when nothing can run beside it, against stock with one process."""

from __future__ import annotations

from benchmarks.field import open_field
from benchmarks.results import Row, Setup, compare
from benchmarks.throughput import take_turns


def run(setup: Setup) -> list[Row]:
    """At least 0.95 × stock `-c 1`, itself in order as long as nothing goes wrong."""
    keys = ["one"] * setup.scaled(6_000)
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=1) as field:
        pairs = take_turns(setup, field, "empty", keys, concurrency=1)
    return [compare("empty tasks, one key, -c 1", pairs, unit="/s", at_least=0.95)]
