"""Two short soaks with fixed seeds: workers, publishers and faults as in a long one, on the broker under test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from soak.plan import NODE_KINDS, Kind, plan_faults
from soak.run import run_soak
from soak.servers import Servers
from soak.verdict import is_clean

pytestmark = [pytest.mark.timeout(300), pytest.mark.soak]

MINUTES = 25 / 60
WORKERS = PUBLISHERS = 2
# Each restarts the broker, and between them they hold every other kind of fault.
SEEDS = (4479, 8471)
# The broker may not be ours to kill, and is no cluster.
KINDS = [kind for kind in Kind if kind not in (Kind.KILL_BROKER, *NODE_KINDS)]


def test_the_seeds_hold_every_kind_of_fault_between_them() -> None:
    plans = [plan_faults(seed, MINUTES, workers=WORKERS, publishers=PUBLISHERS, kinds=KINDS) for seed in SEEDS]
    assert {fault.kind for plan in plans for fault in plan} == set(KINDS)
    assert all(any(fault.kind is Kind.RESTART_BROKER for fault in plan) for plan in plans)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_out_of_order_or_done_twice_under_random_faults(
    seed: int, broker_url: str, redis_url: str, restart_broker: Callable[[], None], tmp_path: Path
) -> None:
    # Given the faults of a seed
    servers = Servers(broker_url, redis_url, os.environ["SHARDING_TEST_BROKER_RESTART"])
    plan = plan_faults(seed, MINUTES, workers=WORKERS, publishers=PUBLISHERS, kinds=KINDS)
    said: list[str] = []
    # When publishers publish and workers work under them
    findings = run_soak(
        servers,
        plan,
        minutes=MINUTES,
        workers=WORKERS,
        publishers=PUBLISHERS,
        rate=60,
        folder=tmp_path,
        say=said.append,
    )
    # Then all of it ran, in order, and was entered once
    assert is_clean(findings), "\n".join(said)
    assert findings.counts["published"] > 100, "\n".join(said)
    # And nothing is left running, however the faults of one worker followed each other
    assert find_processes_of(tmp_path) == []


def find_processes_of(folder: Path) -> list[str]:
    """Return the command lines of the processes that were given the folder of a soak."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SOAK_FOLDER={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended, or is not ours
    return found
