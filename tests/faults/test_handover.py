"""Shutdowns of every kind under load: nothing is lost or out of order, and only what was cut off runs again."""

from __future__ import annotations

import json
import os
import signal

import pytest

from support.pools import pool_options, pools
from support.publishers import Load
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)

SOFT = json.dumps({"worker_soft_shutdown_timeout": 2.0})
SOFT_ON_IDLE = json.dumps({"worker_soft_shutdown_timeout": 2.0, "worker_enable_soft_shutdown_on_idle": True})
QUIT, INT, TERM = signal.SIGQUIT, signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    "pool",
    pools("prefork", slow=("threads", "solo")),
)
def test_a_warm_shutdown_lets_long_tasks_end_and_repeats_nothing(shop: Shop, pool: str) -> None:
    # Given an owner in the middle of long tasks, with more of their keys behind them, and a standby
    owner = shop.worker(*pool_options(pool))
    for number in range(4):
        shop.send("step", f"long{number}", 1, seconds=2)
        shop.send("step", f"long{number}", 2)
    assert shop.trace.wait_for(1, kind="start")
    shop.worker(*pool_options(pool))
    # When the owner is shut down warm under load
    with Load(shop) as load:
        assert owner.stop() == 0
        load.wait_for_more(30)
    # Then everything ran once, in order
    assert shop.trace.wait_for(8 + load.number), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


@pytest.mark.parametrize(
    ("pool", "settings"),
    [
        pytest.param("prefork", SOFT),
        pytest.param("threads", SOFT, marks=pytest.mark.slow),
        pytest.param("solo", SOFT, marks=pytest.mark.slow),
        pytest.param("prefork", SOFT_ON_IDLE, marks=pytest.mark.slow),
        pytest.param("threads", SOFT_ON_IDLE, marks=pytest.mark.slow),
        pytest.param("solo", SOFT_ON_IDLE, marks=pytest.mark.slow),
    ],
    ids=["prefork", "threads", "solo", "prefork on idle", "threads on idle", "solo on idle"],
)
def test_a_soft_shutdown_lets_short_tasks_end_and_runs_long_ones_elsewhere(
    shop: Shop, pool: str, settings: str
) -> None:
    # Given an owner with a long task, one that ends within the time-out, and their successors; and a standby
    owner = shop.worker(*pool_options(pool), SHOP_SETTINGS=settings)
    shop.send("step", "long", 1, seconds=5)
    shop.send("step", "long", 2)
    assert shop.trace.wait_for(1, kind="start")
    shop.worker(*pool_options(pool))
    with Load(shop, seconds=0.02) as load:
        load.wait_for_more(0 if pool == "solo" else 10)
        # When the owner is told to quit under load
        owner.signal(QUIT)
        owner.wait()
        load.wait_for_more(30)
    # Then all runs in order, and at most what was in the pool runs again
    assert shop.trace.wait_for(2 + load.number), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= 4, verdict


@pytest.mark.parametrize(
    ("pool", "signals", "env"),
    [
        ("prefork", (QUIT,), {}),
        pytest.param("threads", (QUIT,), {}, marks=pytest.mark.slow),
        ("solo", (QUIT,), {}),
        ("prefork", (TERM, TERM), {}),
        pytest.param("threads", (TERM, TERM), {}, marks=pytest.mark.slow),
        pytest.param("solo", (TERM, TERM), {}, marks=pytest.mark.slow),
        pytest.param("prefork", (INT, INT), {}, marks=pytest.mark.slow),
        pytest.param("threads", (INT, INT), {}, marks=pytest.mark.slow),
        pytest.param("solo", (INT, INT), {}, marks=pytest.mark.slow),
        pytest.param("prefork", (TERM, QUIT), {}, marks=pytest.mark.slow),
        pytest.param("threads", (TERM, QUIT), {}, marks=pytest.mark.slow),
        pytest.param("solo", (TERM, QUIT), {}, marks=pytest.mark.slow),
        pytest.param("prefork", (TERM,), {"REMAP_SIGTERM": "SIGQUIT"}, marks=pytest.mark.slow),
        pytest.param("threads", (TERM,), {"REMAP_SIGTERM": "SIGQUIT"}, marks=pytest.mark.slow),
        pytest.param("solo", (TERM,), {"REMAP_SIGTERM": "SIGQUIT"}, marks=pytest.mark.slow),
    ],
)
def test_a_cold_shutdown_under_load_loses_and_reorders_nothing(
    shop: Shop, pool: str, signals: tuple[signal.Signals, ...], env: dict[str, str]
) -> None:
    # Given an owner at work, with a long task, and a standby
    owner = shop.worker(*pool_options(pool), **env)
    # Celery hangs if a second signal finds it closing consumers after the first, so the task is still there then.
    shop.send("step", "long", 1, seconds=3 if len(signals) == 1 else 12)
    shop.send("step", "long", 2)
    assert shop.trace.wait_for(1, kind="start")
    shop.worker(*pool_options(pool))
    with Load(shop, seconds=0.02) as load:
        load.wait_for_more(0 if pool == "solo" else 10)
        # When the owner is shut down cold
        for count, number in enumerate(signals, start=1):
            owner.signal(number)
            if count < len(signals):
                owner.wait_for("shutdown (MainProcess)")
        owner.wait()
        load.wait_for_more(30)
    # Then all runs in order, and at most what was in the pool runs again
    assert shop.trace.wait_for(2 + load.number), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= 4, verdict


def test_a_signal_to_end_that_reaches_the_pool_processes_too_loses_and_reorders_nothing(shop: Shop) -> None:
    # Given an owner at work, with long tasks, and a standby
    owner = shop.worker(*pool_options("prefork"))
    for number in range(2):
        shop.send("step", f"long{number}", 1, seconds=3)
        shop.send("step", f"long{number}", 2)
    assert shop.trace.wait_for(2, kind="start")
    shop.worker(*pool_options("prefork"))
    with Load(shop, seconds=0.02) as load:
        load.wait_for_more(10)
        # When its service manager sends SIGTERM to all of its processes
        os.killpg(owner.pid, TERM)
        owner.wait()
        load.wait_for_more(30)
    # Then all runs in order, and at most what was in the pool runs again
    assert shop.trace.wait_for(4 + load.number), shop.verdict()
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= 4, verdict


def test_a_remote_shutdown_hands_over_without_a_repetition(shop: Shop) -> None:
    # Given an owner at work, and a standby
    owner = shop.worker(*pool_options("prefork"))
    shop.worker(*pool_options("prefork"))
    with Load(shop) as load:
        load.wait_for_more(10)
        # When the owner is shut down by remote control
        shop.app.control.shutdown(destination=[owner.name])
        assert owner.wait() == 0
        load.wait_for_more(30)
    # Then everything ran once, in order
    assert shop.trace.wait_for(load.number), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_three_workers_restarted_in_turn_lose_repeat_and_reorder_nothing(shop: Shop, rounds: int) -> None:
    # Given three workers under a steady load, and a group that begins each message once at most
    workers = [shop.worker("-c", "2", SHOP_MAX_ATTEMPTS="1") for _ in range(3)]
    with Load(shop, keys=24, per_second=100, seconds=0.01) as load:
        # When each is stopped warm and started again in turn, several rounds
        for worker in workers * rounds:
            load.wait_for_more(30)
            assert worker.stop() == 0
            worker.start()
    # Then nothing is lost, repeated, overlapping or out of order, and nothing was condemned for a restart
    assert shop.trace.wait_for(load.number), shop.verdict()
    assert shop.verdict().is_clean, shop.verdict()
