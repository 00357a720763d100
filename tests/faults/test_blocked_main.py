"""A main process that is blocked, or would be: its heartbeats go on, or its runs end before others begin."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.exceptions import TimeLimitExceeded

from celery_sharding.testing import FaultProxy
from celery_sharding.testing.processes import wait_until
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)

HEARTBEAT = "2"


@pytest.fixture
def redis(redis_url: str) -> Iterator[FaultProxy]:
    """What stands between one host and the result backend."""
    with FaultProxy(redis_url) as proxy:
        yield proxy


@pytest.fixture
def blocked(group_name: str, broker_url: str, redis_url: str, tmp_path: Path) -> Iterator[Shop]:
    with Shop(group_name, broker_url, tmp_path, app="blocked", backend=redis_url) as shop:
        yield shop


def find_overlaps(shop: Shop) -> list[str]:
    """Return the messages of which a run still showed when another run of the key had begun."""
    latest: dict[str, str] = {}
    found = []
    for mark in shop.trace.read():
        if mark.kind == "start":
            latest[mark.key] = mark.run
        elif mark.kind in ("tick", "end") and latest.get(mark.key) != mark.run:
            found.append(f"{mark.key} {mark.number}")
    return found


def let_end(shop: Shop) -> None:
    Path(f"{shop.trace.path}.enough").touch()


def runs_of(shop: Shop, kind: str, key: str) -> list[str]:
    return [mark.run for mark in shop.trace.read() if mark.kind == kind and mark.key == key]


def test_a_time_limit_takes_effect_while_the_result_backend_does_not_answer(blocked: Shop, redis: FaultProxy) -> None:
    # Given a worker whose result backend is out of reach behind a link, and a task with a time limit
    worker = blocked.worker("-c", "2", SHOP_BACKEND=redis.url, SHOP_HEARTBEAT=HEARTBEAT)
    result = blocked.send("limited", "a", 1)
    blocked.send("step", "a", 2)
    assert blocked.trace.wait_for(1, kind="tick")
    # When the backend answers no more, and a standby comes
    redis.blackhole()
    blocked.worker("-c", "2", SHOP_HEARTBEAT=HEARTBEAT)
    # Then the run ends, and the next of its key runs, at the same worker, which has kept its connection
    assert blocked.trace.wait_for(1, timeout_seconds=25), blocked.trace.read()[-1]
    assert find_overlaps(blocked) == []
    assert len(runs_of(blocked, "start", "a")) == 2
    assert "onnection to broker lost" not in worker.output
    # And the state is stored when the backend answers again
    redis.heal()
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=60)


def test_what_the_main_process_tells_holds_nothing_up_while_the_result_backend_does_not_answer(
    blocked: Shop, redis: FaultProxy
) -> None:
    # Given a worker whose result backend is out of reach behind a link, with runs of some keys
    settings = json.dumps({"worker_lost_wait": 1})
    worker = blocked.worker(
        "-c", "8", SHOP_BACKEND=redis.url, SHOP_HEARTBEAT=HEARTBEAT, SHOP_MAX_ATTEMPTS="1", SHOP_SETTINGS=settings
    )
    terminated = blocked.send("ticking", "terminated", 1)
    revoked = blocked.send("step", "terminated", 2)
    assert blocked.trace.wait_for(1, kind="tick")
    # When the backend answers no more, and runs are terminated, revoked and lost, and a message is nobody's
    redis.blackhole()
    control = blocked.app.control
    assert control.revoke(revoked.id, reply=True, timeout=10)
    assert control.revoke(terminated.id, terminate=True, signal="SIGKILL", reply=True, timeout=10)
    lost = blocked.send("dies", "lost", 1)
    unknown = blocked.send("nobody", "unknown", 1)
    keys = ["terminated", "lost", "unknown"]
    for key in keys:
        blocked.send("step", key, 3)
    # Then the next of each key runs, and the connection is kept
    assert blocked.trace.wait_for(len(keys), timeout_seconds=60), blocked.trace.read()[-1]
    assert "onnection to broker lost" not in worker.output
    # And each is a dead letter but what had begun and was to be ended
    letters = {letter.headers["id"] for letter in blocked.dead_letters(3)}
    assert letters == {revoked.id, lost.id, unknown.id}
    # And its state is stored when the backend answers again
    redis.heal()
    assert wait_until(
        lambda: [result.state for result in (terminated, lost, unknown)] == ["REVOKED", "FAILURE", "FAILURE"],
        timeout_seconds=60,
    ), [result.state for result in (terminated, lost, unknown)]


@pytest.mark.parametrize("how", ["blocked", "stopped"])
def test_a_main_process_that_stands_still_ends_its_runs_before_they_begin_elsewhere(blocked: Shop, how: str) -> None:
    # Given a worker that runs tasks of some keys beside an ordinary one, and a standby
    worker = blocked.worker("-c", "4", SHOP_HEARTBEAT=HEARTBEAT)
    keys = ["a", "b", "c"]
    blocked.app.send_task("plain.ticking", args=[0], queue=f"{blocked.group}-plain")
    for key in keys:
        blocked.send("ticking", key, 1)
        blocked.send("step", key, 2)
    assert blocked.trace.wait_for(len(keys) + 1, kind="tick")
    blocked.worker("-c", "4", SHOP_HEARTBEAT=HEARTBEAT)
    # When its main thread is blocked, or its main process is stopped, for longer than the broker waits
    if how == "blocked":
        blocked.app.control.broadcast("doze", destination=[worker.name], arguments={"seconds": 12})
    else:
        worker.signal(signal.SIGSTOP)
    # Then the standby begins them, and the runs of the first have ended before
    assert wait_until(lambda: all(len(runs_of(blocked, "start", key)) == 2 for key in keys), timeout_seconds=40)
    let_end(blocked)
    worker.signal(signal.SIGCONT)
    assert blocked.trace.wait_for(2 * len(keys) + 1, timeout_seconds=60), blocked.verdict()
    assert find_overlaps(blocked) == []
    assert blocked.verdict().is_clean, blocked.verdict()
    # And an ordinary task beside them was let be
    assert len(runs_of(blocked, "start", "plain")) == 1
    # And the worker takes part again
    assert wait_until(lambda: worker.name in blocked.owners(), timeout_seconds=60), blocked.owners()
