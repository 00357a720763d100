"""Whatever is raised while a run ends, it leaves its lane: its key goes on, its slot is free, and something says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(240)

# Of an exit the worker learns late in a prefork pool; 10 s unless told otherwise.
SETTINGS = json.dumps({"worker_lost_wait": 1})

ERRORS = [
    "unprintable", "exiting text", "unpicklable", "no exception", "system exit", "keyboard", "generator exit",
    "memory", "shutdown",
]  # fmt: skip
HOOKS = ["on_success", "on_failure", "on_retry", "after_return"]
SIGNALS = ["task_prerun", "task_postrun", "task_success", "task_failure", "task_retry"]
REQUESTS = ["on_accepted", "on_failure", "on_retry", "send_event"]
RAISED = ["error", "reject", "memory", "exit"]


def hostile_calls(pool: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for what in ERRORS:
        # On a solo pool it does what it says.
        if (pool, what) != ("solo", "shutdown"):
            yield "raises", {"what": what}
    for what in ("soon", float("nan"), -5):
        yield "retries", {"what": what}
    for task, places in (("hooked", HOOKS), ("received", SIGNALS), ("requested", REQUESTS)):
        for place in places:
            for what in RAISED:
                yield task, {"place": place, "what": what}
    yield "returns", {}


@pytest.fixture
def hostile(group_name: str, broker_url: str, tmp_path: Path) -> Iterator[Shop]:
    with Shop(group_name, broker_url, tmp_path, app="hostile") as shop:
        yield shop


@pytest.mark.parametrize(
    ("pool", "on_failure"),
    [
        ("prefork", "dead-letter"),
        ("threads", "continue"),
        ("solo", "dead-letter"),
        ("gevent", "continue"),
        pytest.param("prefork", "continue", marks=pytest.mark.slow),
        pytest.param("threads", "dead-letter", marks=pytest.mark.slow),
        pytest.param("solo", "continue", marks=pytest.mark.slow),
        pytest.param("gevent", "dead-letter", marks=pytest.mark.slow),
    ],
)
def test_no_end_of_a_run_locks_its_key_or_keeps_its_slot(hostile: Shop, pool: str, on_failure: str) -> None:
    # Given tasks whose ends go wrong in every way, each between two good ones of its key
    results = {}
    good = []
    for number, (task, kwargs) in enumerate(hostile_calls(pool)):
        key = f"k{number}"
        good += [(key, 1), (key, 3)]
        hostile.send("step", key, 1)
        results[f"{task} {kwargs}"] = hostile.send(task, key, 2, **kwargs)
        hostile.send("step", key, 3)
    # When a worker with few slots runs them
    worker = hostile.worker(
        *pool_options(pool, 2), "-E", SHOP_ON_FAILURE=on_failure, SHOP_MAX_ATTEMPTS="2", SHOP_SETTINGS=SETTINGS
    )
    # Then all good ones run, in order
    hostile.published = good
    assert hostile.trace.wait_for(len(good), timeout_seconds=150), hostile.verdict()
    assert hostile.verdict().is_clean, hostile.verdict()
    # And nothing is left, and each of the others has a state that says it has ended
    assert wait_until(hostile.has_nothing_left, timeout_seconds=60)
    assert wait_until(lambda: all(result.ready() for result in results.values()), timeout_seconds=30), {
        name: result.state for name, result in results.items() if not result.ready()
    }
    # And the worker still has all of its slots
    assert worker.is_running
    before = len(good)
    for key in ("a", "b", "c", "d"):
        hostile.send("step", key, 1)
    assert hostile.trace.wait_for(before + 4, timeout_seconds=30), hostile.verdict()


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo", "gevent")))
def test_a_failure_without_a_text_is_a_dead_letter_with_its_reason(hostile: Shop, pool: str) -> None:
    # Given a group that keeps failures, and an error that has no text
    hostile.worker(*pool_options(pool, 2), SHOP_ON_FAILURE="dead-letter")
    # When a task raises it
    hostile.send("raises", "a", 1, what="unprintable")
    # Then its dead letter names the error
    [letter] = hostile.dead_letters(1)
    assert letter.headers["shard_dead_reason"] == "failed: Unprintable"
    assert "Unprintable" in letter.headers["shard_dead_error"]


@pytest.mark.parametrize("what", ["system exit", "no exception", "shutdown"])
def test_a_task_that_ends_its_thread_is_run_again_and_then_a_dead_letter(hostile: Shop, what: str) -> None:
    # Given a worker of threads with one slot
    hostile.worker("-c", "1", "-P", "threads", SHOP_MAX_ATTEMPTS="2")
    # When a task leaves its body by an exit, which `no exception` is not
    result = hostile.send("raises", "a", 1, what=what)
    hostile.send("step", "a", 2)
    # Then it has failed, and its key goes on
    assert hostile.trace.wait_for(1)
    assert wait_until(lambda: result.state == "FAILURE", timeout_seconds=20), result.state
    with Connection(hostile.broker_url) as connection:
        letters = connection.channel().queue_declare(hostile.names.dead, passive=True).message_count
    assert letters == (0 if what == "no exception" else 1)
