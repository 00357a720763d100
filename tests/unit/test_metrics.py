"""What the collector makes of a view; no broker."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from celery_sharding.journal.histogram import BOUNDS_SECONDS
from celery_sharding.metrics import ShardCollector, register, table
from celery_sharding.monitoring.status import GroupStatus, ShardStatus, Snapshot
from celery_sharding.monitoring.totals import Totals
from celery_sharding.monitoring.watcher import STALE_SECONDS, View
from support.paths import ROOT

TIMES = (4.5, *range(1, len(BOUNDS_SECONDS) + 2))


def row(index: int, **facts: object) -> ShardStatus:
    values = {
        "kind": "live",
        "index": index,
        "queue": f"shards.orders.g002.{index:03}",
        "state": "ok",
        "ready": 3,
        "held": 2,
    }
    values |= {"running": 1, "owner": "w@host", "standbys": ("s@host",), "lag_seconds": 1.5, "lag_estimated": False}
    return ShardStatus(**(values | {"since": 7.0} | facts))


def view(*, age_seconds: float = 0.0, error: str = "") -> View:
    old = row(3, kind="old", queue="shards.orders.g001.003", state="draining")
    nobody = row(1, state="unowned", ready=None, held=None, running=None, owner=None, standbys=(), lag_seconds=None)
    group = GroupStatus("orders", declared=True, generation=2, shards=(row(0), nobody), earlier=(old,))
    totals = {("orders", "0"): Totals({"done": 9}, waits=TIMES, handovers=1)}
    return View(Snapshot(time.time() - age_seconds, (group,)), error, totals)


def collect(shown: View) -> dict[str, float]:
    """Return what a page of metrics says, by name and labels as they stand there."""
    registry = CollectorRegistry()
    registry.register(ShardCollector(SimpleNamespace(view=shown)))
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_it_shows_what_is_known_and_nothing_for_what_is_not():
    found = collect(view())

    assert found["celery_sharding_up"] == 1
    assert found['celery_sharding_waiting_messages{group="orders",shard="0"}'] == 3
    assert found['celery_sharding_consumers{group="orders",shard="0"}'] == 2
    assert found['celery_sharding_owner_info{group="orders",shard="0",worker="w@host"}'] == 1
    assert found['celery_sharding_state_info{group="orders",shard="g001.003",state="draining"}'] == 1
    assert found['celery_sharding_done_total{group="orders",shard="0"}'] == 9
    assert found['celery_sharding_consumers{group="orders",shard="1"}'] == 0
    assert not [
        name for name in found if 'shard="1"' in name and ("waiting" in name or "lag" in name or "owner" in name)
    ]


def test_counters_of_a_shard_begin_with_0():
    assert collect(view())['celery_sharding_done_total{group="orders",shard="1"}'] == 0


def test_buckets_are_cumulative():
    found = collect(view())
    bucket = 'celery_sharding_wait_seconds_bucket{{group="orders",le="{}",shard="0"}}'.format
    assert [found[bucket(bound)] for bound in (*BOUNDS_SECONDS[:3], "+Inf")] == [1, 3, 6, sum(TIMES[1:])]
    assert found['celery_sharding_wait_seconds_sum{group="orders",shard="0"}'] == 4.5
    assert found['celery_sharding_wait_seconds_count{group="orders",shard="0"}'] == sum(TIMES[1:])


@pytest.mark.parametrize(
    "lost", [view(error="gone"), view(age_seconds=STALE_SECONDS + 5)], ids=["an error", "it hangs"]
)
def test_when_the_groups_are_not_followed_old_gauges_are_left_out_and_counters_stay(lost):
    found = collect(lost)

    assert found["celery_sharding_up"] == 0
    assert "celery_sharding_snapshot_age_seconds" in found
    assert not [name for name in found if name.startswith(("celery_sharding_waiting", "celery_sharding_shards"))]
    assert found['celery_sharding_done_total{group="orders",shard="0"}'] == 9


def test_before_the_first_look_it_says_that_it_is_not_up():
    assert collect(View(error="not connected yet")) == {"celery_sharding_up": 0}


def test_the_default_registry_has_one_collector_at_a_time():
    register(ShardCollector(SimpleNamespace(view=view(error="gone"))))
    register(ShardCollector(SimpleNamespace(view=view())))
    assert REGISTRY.get_sample_value("celery_sharding_up") == 1


def test_no_label_holds_a_key_or_an_id():
    labels = {label for name in collect(view()) for label in re.findall(r'(\w+)="', name)}
    assert labels == {"group", "shard", "worker", "state", "le"}


def test_the_reference_names_every_metric_with_its_meaning():
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(celery_sharding_\w+)` \| (.*?) \|$", text, re.MULTILINE))
    known = dict([table.UP, table.AGE, table.WAIT, table.RUN, table.HANDOVERS])
    known |= {each.name: each.help for each in (*table.GROUP_GAUGES, *table.SHARD_GAUGES, *table.COUNTERS)}
    assert rows == known
    assert set(table.NAMES) == set(known)
    assert ", ".join(f"{bound:g}" for bound in BOUNDS_SECONDS) in text
