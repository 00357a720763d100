"""The API: `/api/shards[/GROUP[/N]]` to read, and posts to act. Open to whom Flower's own API is.

Errors are a line of text: 404 no such group or shard, 409 it cannot be done now, 503 the broker is out of reach,
401 and 403 as in `actions`.
"""

from __future__ import annotations

import json
import logging
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from typing import Any

from flower.api import BaseApiHandler
from tornado import web
from tornado.ioloop import IOLoop

from celery_sharding.errors import TopologyError
from celery_sharding.flower.actions import Refused, check_origin, judge, replay, set_paused
from celery_sharding.flower.feed import Feed
from celery_sharding.flower.pages import is_read_only

logger = logging.getLogger(__name__)


class _Api(BaseApiHandler):
    """Answers errors of ours as text, with the status that fits."""

    def initialize(self, feed: Feed) -> None:
        self.feed = feed

    def set_default_headers(self) -> None:
        super().set_default_headers()
        # Flower lets scripts of any site use its API, if nobody has to log in: not ours.
        for name in ("Origin", "Headers", "Methods"):
            self.clear_header(f"Access-Control-Allow-{name}")

    def write_error(self, status_code: int, **facts: Any) -> None:
        exc = facts.get("exc_info", (None, None))[1]
        refused = exc if isinstance(exc, Refused) else judge(exc) if isinstance(exc, Exception) else None
        self.set_status(status_code if refused is None else refused.status)
        text = str(refused) if refused is not None else getattr(exc, "log_message", None) or self._reason
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(f"{text}\n".encode(errors="backslashreplace"))

    def log_exception(self, kind: Any, exc: Any, trace: Any) -> None:
        if not isinstance(exc, Refused) and (not isinstance(exc, Exception) or judge(exc) is None):
            super().log_exception(kind, exc, trace)

    def answer(self, found: dict[str, Any], what: Any) -> None:
        """Send what was found; if `what` is None, the broker was never reached."""
        if what is None:
            raise Refused(503, f"the broker was not reached yet: {found['error']}")
        self.write(found)


class ShardsApi(_Api):
    """`GET /api/shards`."""

    @web.authenticated
    def get(self) -> None:
        found = self.feed.overview()
        self.answer(found, found["at"])


class GroupApi(_Api):
    """`GET /api/shards/GROUP`."""

    @web.authenticated
    def get(self, group: str) -> None:
        found = self.feed.group(group)
        self.answer(found, found["group"])


class ShardApi(_Api):
    """`GET /api/shards/GROUP/N`."""

    @web.authenticated
    def get(self, group: str, index: str) -> None:
        try:
            found = self.feed.shard(group, int(index))
        except TopologyError as exc:
            raise Refused(404, str(exc)) from exc
        self.answer(found, found["shard"])


class _Action(_Api):
    def prepare(self) -> None:
        if self.request.method == "POST":
            check_origin(self.request.headers, self.request.host)
        super().prepare()

    async def act(self, action: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Do it in a thread, signed by Flower's user, and send what came of it."""
        if is_read_only(self.application):
            raise Refused(403, "Flower runs in read-only mode")
        by = f"{self._user()} (Flower)"
        logger.info("%s: %s by %s", self.request.path, self.request.method, by)
        work = partial(action, self.feed.sharding, *arguments, by=by)
        self.write(await IOLoop.current().run_in_executor(self.application.executor, work))

    def _user(self) -> str:
        """Return the name of who is logged in: OAuth's, else that of the basic authentication that Flower has checked.

        Flower itself keeps but "yes" of the latter.
        """
        if isinstance(self.current_user, str):
            return self.current_user
        if not self.application.options.basic_auth:
            return "somebody"
        credentials = self.request.headers.get("Authorization", "").partition(" ")[2]
        return b64decode(credentials).decode().partition(":")[0]


class PauseApi(_Action):
    """`POST /api/shards/GROUP[/N]/pause` and `…/resume`."""

    @web.authenticated
    async def post(self, group: str, index: str | None, verb: str) -> None:
        await self.act(set_paused, verb, group, None if index is None else int(index))


class ReplayApi(_Action):
    """`POST /api/shards/GROUP/dead-letters/replay`, of all, or of those in a body as `{"ids": ["3f…"]}`."""

    @web.authenticated
    async def post(self, group: str) -> None:
        await self.act(replay, group, self._ids())

    def _ids(self) -> list[str] | None:
        if not self.request.body:
            return None
        try:
            ids = json.loads(self.request.body)["ids"]
        except (ValueError, KeyError, TypeError):
            ids = None
        if not isinstance(ids, list) or not ids or not all(isinstance(each, str) for each in ids):
            raise Refused(400, 'the body is empty, for all, or as {"ids": ["3f9c…"]}')
        return ids
