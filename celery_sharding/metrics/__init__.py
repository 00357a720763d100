"""Prometheus metrics of the groups, from what a watcher knows. Needs the extra `metrics`.

`ShardCollector` never asks the broker: a scrape reads the watcher's last view. While the broker is out of reach, gauges
are left out, because old values would look like new ones; counters stay. `table` lists all metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from celery_sharding.journal.histogram import BOUNDS_SECONDS
from celery_sharding.metrics import table
from celery_sharding.monitoring.status import GroupStatus
from celery_sharding.monitoring.totals import Totals
from celery_sharding.monitoring.watcher import View

T = TypeVar("T")

_SHARD = ("group", "shard")
_BOUNDS = (*(str(bound) for bound in BOUNDS_SECONDS), "+Inf")


class ViewSource(Protocol):
    """What follows the groups: a `Watcher`."""

    @property
    def view(self) -> View: ...


class ShardCollector(Collector):
    """Metrics of a watcher's view, for a registry of prometheus_client; collected in any thread, at once."""

    def __init__(self, source: ViewSource) -> None:
        self._source = source

    def describe(self) -> Iterator[Metric]:
        """Yield every metric without values, so that a registry knows the names."""
        return _families((), {}, up=False, age_seconds=None)

    def collect(self) -> Iterator[Metric]:
        view, now = self._source.view, time.time()
        age_seconds = None if view.snapshot is None else max(0.0, now - view.snapshot.taken_at)
        up = view.snapshot is not None and not view.why_stale(now)
        groups = view.snapshot.groups if view.snapshot is not None and up else ()
        # A shard's counters start at 0, so that the first increase is visible.
        totals = {(group.name, str(row.index)): Totals() for group in groups for row in group.shards}
        return _families(groups, totals | dict(view.totals), up=up, age_seconds=age_seconds)


def register(collector: ShardCollector) -> None:
    """Register `collector` in prometheus_client's default registry, in place of an earlier one."""
    global _registered
    if _registered is not None:
        REGISTRY.unregister(_registered)
    REGISTRY.register(collector)
    _registered = collector


_registered: ShardCollector | None = None


def _families(
    groups: Sequence[GroupStatus],
    totals: dict[tuple[str, str], Totals],
    *,
    up: bool,
    age_seconds: float | None,
) -> Iterator[Metric]:
    yield GaugeMetricFamily(*table.UP, value=up)
    age = GaugeMetricFamily(*table.AGE)
    if age_seconds is not None:
        age.add_metric((), age_seconds)
    yield age
    yield from _gauges(groups)
    handovers = CounterMetricFamily(*table.HANDOVERS, labels=_SHARD)
    waits = HistogramMetricFamily(*table.WAIT, labels=_SHARD)
    runs = HistogramMetricFamily(*table.RUN, labels=_SHARD)
    for shard, counted in totals.items():
        handovers.add_metric(shard, counted.handovers)
        for times_of, times in ((waits, counted.waits), (runs, counted.runs)):
            buckets = list(zip(_BOUNDS, accumulate(times[1:]), strict=True))
            times_of.add_metric(shard, buckets, sum_value=times[0])
    for counter in table.COUNTERS:
        family = CounterMetricFamily(counter.name, counter.help, labels=_SHARD)
        for shard, counted in totals.items():
            family.add_metric(shard, counted.counters.get(counter.counter, 0))
        yield family
    yield from (handovers, waits, runs)


def _gauges(groups: Sequence[GroupStatus]) -> Iterator[Metric]:
    for of_group in table.GROUP_GAUGES:
        yield _gauge(of_group, ("group",), [((group.name,), group) for group in groups])
    rows = [((group.name, group.label(row)), row) for group in groups for row in group.rows]
    for of_shard in table.SHARD_GAUGES:
        yield _gauge(of_shard, _SHARD, rows)


def _gauge(gauge: table.Gauge[T], labels: Sequence[str], rows: Sequence[tuple[tuple[str, ...], T]]) -> Metric:
    family = GaugeMetricFamily(gauge.name, gauge.help, labels=(*labels, *([gauge.label] if gauge.label else ())))
    for values, row in rows:
        value = gauge.read(row)
        if isinstance(value, str):
            family.add_metric((*values, value), 1)
        elif value is not None:
            family.add_metric(values, value)
    return family
