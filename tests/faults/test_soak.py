"""Short soaks: workers, publishers and faults as in a long one, on the broker under test.

Two have the faults of a seed, one those of the store of results and claims.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from celery_sharding.testing import RedisNode
from soak.plan import NODE_KINDS, STORE_KINDS, Fault, Kind, plan_faults
from soak.run import run_soak
from soak.servers import Servers
from soak.verdict import is_clean

pytestmark = [pytest.mark.timeout(300), pytest.mark.soak]

MINUTES = 25 / 60
WORKERS = PUBLISHERS = 2
# Each restarts the broker, and between them they hold every other kind of fault but those of the store.
SEEDS = (14960, 25475)
# The broker may not be ours to kill, and is no cluster.
KINDS = [kind for kind in Kind if kind not in (Kind.KILL_BROKER, *NODE_KINDS)]
STORE_FAULTS = (
    Fault(3.0, Kind.CUT_BACKEND, "w1", 4.0, 0.0),
    Fault(5.0, Kind.BLACKHOLE_BACKEND, "w2", 6.0, 0.0),
    Fault(13.0, Kind.STOP_STORE, "store", 3.0, 0.0),
    Fault(17.0, Kind.STOP_STORE, "store", 5.0, 0.9),
)


@pytest.fixture
def redis() -> Iterator[RedisNode]:
    """A Redis of the soak's own, to be stopped and started."""
    with RedisNode(keeps_data=True) as node:
        yield node


def plan(seed: int) -> tuple[Fault, ...]:
    kinds = [kind for kind in KINDS if kind not in STORE_KINDS]
    return plan_faults(seed, MINUTES, workers=WORKERS, publishers=PUBLISHERS, kinds=kinds)


def test_the_short_soaks_hold_every_kind_of_fault_between_them() -> None:
    plans = [plan(seed) for seed in SEEDS]
    assert {fault.kind for plan in (*plans, STORE_FAULTS) for fault in plan} == set(KINDS)
    assert all(any(fault.kind is Kind.RESTART_BROKER for fault in plan) for plan in plans)
    assert {fault.hangs for fault in STORE_FAULTS if fault.kind is Kind.STOP_STORE} == {True, False}


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_out_of_order_or_done_twice_under_random_faults(
    seed: int, broker_url: str, redis: RedisNode, restart_broker: Callable[[], None], tmp_path: Path
) -> None:
    # Given a broker that may be restarted, and the faults of a seed
    servers = Servers(broker_url, redis, os.environ["SHARDING_TEST_BROKER_RESTART"])
    # When publishers publish and workers work under them, then all of it ran, in order, and was entered once
    expect_clean(servers, plan(seed), tmp_path)


def test_nothing_is_lost_buried_or_entered_twice_while_results_and_claims_cannot_be_stored(
    broker_url: str, redis: RedisNode, tmp_path: Path
) -> None:
    # Given workers that are cut off from their store, one by one and all at once, in every way
    servers = Servers(broker_url, redis)
    # When publishers publish and workers work meanwhile, then all of it ran, in order, and was entered once
    expect_clean(servers, STORE_FAULTS, tmp_path)


def expect_clean(servers: Servers, faults: Sequence[Fault], folder: Path) -> None:
    said: list[str] = []
    findings = run_soak(
        servers,
        faults,
        minutes=MINUTES,
        workers=WORKERS,
        publishers=PUBLISHERS,
        rate=60,
        folder=folder,
        say=said.append,
    )
    assert is_clean(findings), "\n".join([*said, *evidence(folder)])
    assert findings.counts["published"] > 100, "\n".join(said)
    # And nothing is left running, however the faults of one worker followed each other
    assert find_processes_of(folder) == []


def evidence(folder: Path) -> Iterator[str]:
    """Yield what the workers have logged, and what was not confirmed at once: the folder does not outlive CI."""
    for notes in sorted(folder.glob("*.notes")):
        yield from (f"{notes.stem}: {line}" for line in notes.read_text().splitlines() if '"confirmed"' not in line)
    for log in sorted(folder.glob("w*.log")):
        lines = log.read_text(errors="replace").splitlines()
        yield from (f"{log.stem}: {line[:300]}" for line in lines if line.startswith("["))


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
