"""What the pages and the API show: a watcher's view as JSON, and recent events of the journal.

One feed for a Flower process. Its watcher runs in a thread of its own; everything here only reads its last view and
never blocks, so Flower's loop may call it. While the broker is out of reach, the last snapshot stays, and `error` and
`age_seconds` say so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from celery_sharding.errors import TopologyError
from celery_sharding.extension import Sharding
from celery_sharding.flower.recent import WINDOW_SECONDS, Recent
from celery_sharding.monitoring.management import open_management
from celery_sharding.monitoring.snapshot_json import SCHEMA, to_json
from celery_sharding.monitoring.watcher import Watcher
from celery_sharding.shard_names import check_shard
from celery_sharding.timestamps import format_moment

_EVERY_SECONDS = 1.0


class Feed:
    """Follows the groups of an app while it is started.

    Raises:
        UnsupportedBroker: The broker keeps no logs.
    """

    def __init__(self, sharding: Sharding) -> None:
        sharding.backing().require_logs("the page of shards")
        self.sharding = sharding
        self.recent = Recent()
        self.watcher = Watcher(
            sharding.connect,
            sorted(sharding.settings.groups),
            every_seconds=_EVERY_SECONDS,
            history_seconds=WINDOW_SECONDS,
            sink=self.recent,
            management=open_management(sharding.settings, sharding.connect()),
        )

    def overview(self) -> dict[str, Any]:
        view, now = self.watcher.view, time.time()
        found: dict[str, Any] = {"schema": SCHEMA, "at": None, "groups": []}
        age_seconds = None
        if view.snapshot is not None:
            found = to_json(view.snapshot)
            age_seconds = round(max(0.0, now - view.snapshot.taken_at), 3)
        return found | {"age_seconds": age_seconds, "error": view.why_stale(now)}

    def group(self, name: str) -> dict[str, Any]:
        """Return one group; its `group` is None before the broker was first reached.

        Raises:
            UnknownGroup: There is none of this name.
        """
        self.sharding.settings.group(name, needed_by="the address")
        found = self.overview()
        groups = {group["name"]: group for group in found.pop("groups")}
        return found | {"group": groups.get(name)}

    def shard(self, name: str, index: int) -> dict[str, Any]:
        """Return one shard of the live generation, its trend and recent events.

        Its `shard` is None before the broker was first reached.

        Raises:
            UnknownGroup, UnknownShard: There is none.
            TopologyError: The group is not declared, or has no shards yet.
        """
        found = self.group(name)
        group = found.pop("group")
        found |= {"group": name, "shard": None, "trend": [], "events": []}
        if group is None:
            return found
        shards = group["shards"]
        if not shards:
            raise TopologyError(
                f"group {name!r} has no shards yet; run `celery shards declare {name}` or start a worker", group=name
            )
        check_shard(name, index, len(shards))
        queue = shards[index]["queue"]
        points = self.recent.points(queue, now=time.time())
        return found | {
            "shard": shards[index],
            "trend": [
                {"at": format_moment(each.at), "lag_seconds": round(each.lag_seconds, 3), "done_rate": each.rate}
                for each in points
            ],
            "events": [_shown(event) for event in self.recent.events(queue)],
        }


def _shown(event: Mapping[str, Any]) -> dict[str, Any]:
    return {**event, "at": format_moment(float(event["at"]))}
