"""What `status --check` calls wrong; no broker."""

from __future__ import annotations

from dataclasses import replace

import pytest

from celery_sharding.layout.model import OpenSwitch
from celery_sharding.monitoring.health import check_health
from celery_sharding.monitoring.status import GroupStatus, ShardStatus, Snapshot
from support.rows import NOW, ROW

GONE = replace(ROW, index=1, state="unowned", owner=None, standbys=(), held=None)
SWITCH = OpenSwitch("recover", 2, 2, limbo=1, next_limbo=2, step=4, at=NOW - 300)


def check(*rows: ShardStatus, max_lag_seconds: float | None = None, **facts: object) -> list[str]:
    group = replace(GroupStatus("orders", declared=True, generation=1, shards=rows), **facts)
    return [*check_health(Snapshot(NOW, (group,)), max_lag_seconds=max_lag_seconds).problems]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (GONE, "orders: unowned, with work: 1"),
        (replace(GONE, ready=0, lag_seconds=4.0), "orders: unowned, with work: 1"),  # what a lost owner held
        (replace(GONE, state="stuck"), "orders: stuck: 1"),
        (replace(GONE, state="missing", ready=None, lag_seconds=None), "orders: missing: 1"),
        (replace(ROW, index=1, lag_seconds=90.5), "orders: lag above 90 s: 1"),
        (replace(GONE, kind="limbo", queue="shards.orders.limbo001"), "orders: unowned, with work: limbo001"),
    ],
)
def test_what_needs_somebody_is_said(row, problem):
    assert check(ROW, row, max_lag_seconds=90) == [problem]


@pytest.mark.parametrize(
    "row",
    [
        replace(ROW, index=1, lag_seconds=90.0),
        replace(ROW, index=1, state="no standby", standbys=()),
        replace(GONE, ready=0, lag_seconds=0.0),
        replace(GONE, state="paused", lag_seconds=5_000.0),
        replace(GONE, state="waiting", lag_seconds=5_000.0),
        replace(ROW, index=1, lag_seconds=None),
    ],
)
def test_what_is_in_order_or_on_purpose_is_not(row):
    assert check(ROW, row, max_lag_seconds=90) == []


def test_a_group_without_any_worker_is_wrong_though_nothing_waits():
    idle = replace(GONE, ready=0, lag_seconds=0.0)

    assert check(idle, replace(idle, index=2)) == ["orders: no worker consumes it"]
    assert check(replace(idle, state="paused"), paused=True) == []


def test_a_group_that_is_not_declared_is_wrong():
    assert check(declared=False) == ["orders: not declared"]


def test_a_switch_that_stands_still_is_wrong_and_one_under_way_is_not():
    (line,) = check(ROW, switch=SWITCH)

    assert line.startswith("orders: the switch to generation 2 has been at step 4 for 300 s")
    assert check(ROW, switch=replace(SWITCH, at=NOW - 3)) == []


def test_no_standby_is_a_warning_and_many_shards_are_counted():
    rows = [replace(ROW, index=index, state="no standby", standbys=()) for index in range(8)]
    health = check_health(Snapshot(NOW, (GroupStatus("orders", declared=True, generation=1, shards=tuple(rows)),)))

    assert health.problems == ()
    assert health.warnings == ("orders: no standby: 0, 1, 2, 3, 4 and 3 more",)
