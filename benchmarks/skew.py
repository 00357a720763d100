"""Real, skewed keys with 10 ms tasks, against what no ordered worker can pass: stock, or the hottest key alone."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from benchmarks import BRIEF_SECONDS
from benchmarks.field import open_field
from benchmarks.results import Row, Setup, compare
from benchmarks.throughput import CONCURRENCY, SHARDS, take_turns

EVENTS = Path(__file__).resolve().parents[1] / "examples" / "data" / "events.csv"


def run(setup: Setup) -> list[Row]:
    """At least 0.9 × min(stock, 1 / (the hottest key's share × the task's time))."""
    keys = real_keys(setup.scaled(3_000))
    share = Counter(keys).most_common(1)[0][1] / len(keys)
    bound = 1 / (share * BRIEF_SECONDS)
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field:
        pairs = take_turns(setup, field, "brief", keys, concurrency=CONCURRENCY)
    bounded = [(min(stock, bound), ours) for stock, ours in pairs]
    return [compare(f"10 ms, real keys (hottest {share:.0%}), to bound", bounded, unit="/s", at_least=0.9)]


def real_keys(count: int) -> list[str]:
    """Return the keys of the first `count` real events, in their order."""
    with EVENTS.open(newline="") as file:
        return [row["account"] for row, _ in zip(csv.DictReader(file), range(count), strict=False)]
