"""What `import celery_sharding` costs beyond `import celery`, in new processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.results import Row, Setup, limit

CODE = "import time; {before}; started = time.perf_counter(); {timed}; print((time.perf_counter() - started) * 1000)"
NAMES = "from celery_sharding import ShardGroup, Sharding"


def run(setup: Setup) -> list[Row]:
    """Less than 30 ms more; the names of the package are loaded at their first use, when an app has loaded the most."""
    rows = []
    for name, before, timed in (
        ("import celery_sharding", "import celery", "import celery_sharding"),
        ("its names, in an app", "import celery; celery.Celery().amqp", NAMES),
    ):
        times = [time_code(before, timed) for _ in range(3 + setup.rounds)]
        rows.append(limit(name, None, statistics.median(times), unit="ms", at_most=30))
    return rows


def time_code(before: str, timed: str) -> float:
    """Return the milliseconds that `timed` takes in a new process that has run `before`."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(before=before, timed=timed)], check=True, capture_output=True
    )
    return float(done.stdout)
