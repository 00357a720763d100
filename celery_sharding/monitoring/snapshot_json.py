"""A snapshot as JSON for programs: on the command line, in Flower's page and its API. Its shape is a promise."""

from __future__ import annotations

import dataclasses
from typing import Any

from celery_sharding.layout.model import OpenSwitch
from celery_sharding.monitoring.status import GroupStatus, ShardStatus, Snapshot
from celery_sharding.timestamps import format_moment

SCHEMA = 1


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return the snapshot as JSON; moments are ISO 8601 in UTC."""
    return {
        "schema": SCHEMA,
        "at": format_moment(snapshot.taken_at),
        "groups": [_group_to_json(group) for group in snapshot.groups],
    }


def _group_to_json(group: GroupStatus) -> dict[str, Any]:
    switch = group.switch
    return {
        "name": group.name,
        "declared": group.declared,
        "generation": group.generation,
        "ready": group.ready,
        "limbo_ready": group.limbo_ready,
        "dead_letters": group.dead_letters,
        "paused": group.paused,
        "protocol": group.protocol,
        "skew": _round(group.skew),
        "switch": None if switch is None else _switch_to_json(switch),
        "segments": [dataclasses.asdict(segment) for segment in group.segments],
        "shards": [_row_to_json(row) for row in group.shards],
        "earlier": [_row_to_json(row) for row in group.earlier],
    }


def _switch_to_json(switch: OpenSwitch) -> dict[str, Any]:
    found = {name: getattr(switch, name) for name in ("kind", "generation", "shards", "step")}
    return found | {"at": None if switch.at is None else format_moment(switch.at)}


def _row_to_json(row: ShardStatus) -> dict[str, Any]:
    return dataclasses.asdict(row) | {
        "standbys": list(row.standbys),
        "unacknowledged": row.unacknowledged,
        **{name: _round(getattr(row, name)) for name in ("lag_seconds", "in_rate", "out_rate", "clear_seconds")},
        **{name: _moment(getattr(row, name)) for name in ("since", "store_away_since")},
    }


def _moment(value: float | None) -> str | None:
    return None if value is None else format_moment(value)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
