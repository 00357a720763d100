"""The pages `/shards` and `/shards/GROUP/N`, and the data that their scripts fetch.

Flower's login guards them like its other pages. A page is only a frame; its script fetches the data repeatedly, so the
page is served without the broker, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flower.utils import strtobool
from flower.views import BaseHandler
from flower.views.monitor import Metrics
from prometheus_client import generate_latest
from tornado import web
from tornado.ioloop import IOLoop

from celery_sharding.errors import ShardingError, TopologyError, UnknownGroup, UnknownShard
from celery_sharding.flower.actions import HEADER
from celery_sharding.flower.feed import Feed
from celery_sharding.monitoring.shard_state import STATES

STATIC = Path(__file__).parent / "static"


class _Page(BaseHandler):
    def initialize(self, feed: Feed) -> None:
        self.feed = feed

    def set_default_headers(self) -> None:
        super().set_default_headers()
        # Without a login, Flower 2.0 lets pages of any site read its own.
        self.clear_header("Access-Control-Allow-Origin")
        # In a frame of another site, users could be tricked into clicking our buttons.
        self.set_header("Content-Security-Policy", "frame-ancestors 'self'")

    def refused_because(self) -> str:
        """Return why actions are refused, "" if they are allowed."""
        if is_read_only(self.application):
            return "Flower runs in read-only mode"
        return "actions need a login: start Flower with --basic-auth or --auth" if needs_login(self.application) else ""

    def show(self, template: str, **facts: Any) -> None:
        self.render(
            template,
            asset=lambda name: f"{self.reverse_url('shards-static', name)}?v={_content_version(name)}",
            shards_url=self.reverse_url("shards"),
            api_url=self.reverse_url("shards-api"),
            header=HEADER,
            refused=self.refused_because(),
            states=json.dumps({state: {"meaning": text, "advice": advice} for state, (text, advice) in STATES.items()}),
            **facts,
        )


class ShardsPage(_Page):
    @web.authenticated
    def get(self) -> None:
        self.show("shards/overview.html", data_url=self.reverse_url("shards-data"))


class ShardsData(_Page):
    @web.authenticated
    def get(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.write(self.feed.overview())


class ShardPage(_Page):
    @web.authenticated
    def get(self, group: str, index: str) -> None:
        try:
            self.feed.shard(group, int(index))
        except (UnknownGroup, UnknownShard) as exc:
            raise web.HTTPError(404, str(exc)) from exc
        except TopologyError:
            pass  # Not declared; the page says what to do.
        self.show(
            "shards/shard.html", data_url=self.reverse_url("shard-data", group, index), group=group, index=int(index)
        )


class ShardData(_Page):
    @web.authenticated
    def get(self, group: str, index: str) -> None:
        self.set_header("Cache-Control", "no-store")
        try:
            found = self.feed.shard(group, int(index))
        except (UnknownGroup, UnknownShard) as exc:
            raise web.HTTPError(404, str(exc)) from exc
        except ShardingError as exc:
            found = self.feed.group(group) | {
                "group": group,
                "shard": None,
                "trend": [],
                "events": [],
                "hint": str(exc),
            }
        self.write(found | {"tasks": _running_tasks(self.application, f"{group}/{int(index)}", found["shard"])})


class MetricsPage(Metrics):
    """Flower's metrics and ours, written in a thread: with hundreds of shards it takes a tenth of a second."""

    async def get(self) -> None:
        purge = getattr(self.application, "purge_offline_worker_metrics", None)  # Flower 2.0 has none
        if purge is not None:
            purge()
        self.write(await IOLoop.current().run_in_executor(self.application.executor, generate_latest))
        self.set_header("Content-Type", "text/plain")


class ShardsStatic(web.StaticFileHandler):
    """Scripts and styles, which are public."""


def is_read_only(application: Any) -> bool:
    """Say whether Flower refuses all actions, a mode that Flower 2.0 does not have."""
    return bool(getattr(application.options, "read_only", False))


def needs_login(application: Any) -> bool:
    """Say whether Flower's API is closed: it has no login, and was not opened to everybody."""
    options = application.options
    opened = strtobool(os.environ.get("FLOWER_UNAUTHENTICATED_API") or "false")
    return not (options.basic_auth or options.auth or opened)


def _running_tasks(application: Any, shard: str, row: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the running tasks of a shard that Flower knows from events of its owner."""
    if row is None or not row["running"]:
        return []
    return [
        {"task_id": uuid, "task": task.name, "started": task.started}
        for uuid, task in list(application.events.state.tasks.items())
        if task.state == "STARTED" and getattr(task, "shard", None) == shard
        if task.worker is not None and task.worker.hostname == row["owner"]
    ]


def _content_version(name: str) -> str:
    return str(web.StaticFileHandler.get_content_version(str(STATIC / name)))
