"""Ordered throughput of one worker against stock Celery without any order: 100 keys, 10 ms and empty tasks."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.field import SIDES, Field, open_field
from benchmarks.results import Row, Setup, compare

CONCURRENCY, SHARDS, KEYS = 8, 8, 100


def run_brief(setup: Setup) -> list[Row]:
    """10 ms tasks: at least as fast as unordered."""
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field:
        pairs = take_turns(setup, field, "brief", even_keys(setup.scaled(3_000)), concurrency=CONCURRENCY)
    return [compare("10 ms tasks, 100 keys, -c 8", pairs, unit="/s", at_least=1.0)]


def run_empty(setup: Setup) -> list[Row]:
    """Empty tasks: at least as fast as unordered."""
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field:
        pairs = take_turns(setup, field, "empty", even_keys(setup.scaled(9_000)), concurrency=CONCURRENCY)
    return [compare("empty tasks, 100 keys, -c 8", pairs, unit="/s", at_least=1.0)]


def even_keys(count: int) -> list[str]:
    """Return `count` keys, 100 different ones in turn."""
    return [f"key-{number % KEYS}" for number in range(count)]


def take_turns(
    setup: Setup, field: Field, task: str, keys: Sequence[str], *, concurrency: int
) -> list[tuple[float, float]]:
    """Run the backlog on stock and on sharded workers in turn; return the rates of each round."""
    pairs = []
    for number in range(setup.rounds):
        # The order changes from round to round, so that what a run leaves behind falls on both.
        rates = {}
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            rates[side] = field.time_worker(side, task, keys, concurrency=concurrency)
        setup.say(f"{task}: stock {rates['stock']:,.0f}/s, sharded {rates['sharded']:,.0f}/s")
        pairs.append((rates["stock"], rates["sharded"]))
    return pairs
