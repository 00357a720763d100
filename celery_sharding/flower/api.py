"""The API: `GET /api/shards[/GROUP[/N]]` to read, `POST` to act. Flower's own login guards it.

Errors are a line of text: 404 no such group or shard, 409 it cannot be done now, 503 the broker is out of reach,
401 and 403 as in `actions`.
"""

from __future__ import annotations

import json
import logging
from base64 import b64decode
from functools import partial
from typing import Any

from flower.api import BaseApiHandler
from tornado import web
from tornado.ioloop import IOLoop

from celery_sharding.errors import TopologyError
from celery_sharding.flower.actions import Refused, check_origin, refusal_for, replay, set_paused
from celery_sharding.flower.feed import Feed
from celery_sharding.flower.pages import is_read_only

logger = logging.getLogger(__name__)


class _Api(BaseApiHandler):
    """Answers our errors as text, with a fitting status."""

    def initialize(self, feed: Feed) -> None:
        self.feed = feed

    def set_default_headers(self) -> None:
        super().set_default_headers()
        # Without a login, Flower lets scripts of any site use its API: not ours.
        for name in ("Origin", "Headers", "Methods"):
            self.clear_header(f"Access-Control-Allow-{name}")

    def write_error(self, status_code: int, **facts: Any) -> None:
        exc = facts.get("exc_info", (None, None))[1]
        refused = exc if isinstance(exc, Refused) else refusal_for(exc) if isinstance(exc, Exception) else None
        self.set_status(status_code if refused is None else refused.status)
        text = str(refused) if refused is not None else getattr(exc, "log_message", None) or self._reason
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(f"{text}\n".encode(errors="backslashreplace"))

    def log_exception(self, kind: Any, exc: Any, trace: Any) -> None:
        if not isinstance(exc, Refused) and (not isinstance(exc, Exception) or refusal_for(exc) is None):
            super().log_exception(kind, exc, trace)

    def answer(self, found: dict[str, Any], what: Any) -> None:
        """Send what was found; `what` is None if the broker was never reached."""
        if what is None:
            raise Refused(503, f"the broker has not been reached yet: {found['error']}")
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

    def perform(self, *arguments: Any, by: str) -> dict[str, Any]:
        raise NotImplementedError

    async def act(self, *arguments: Any) -> None:
        """Do it in a thread, signed by Flower's user, and send what came of it."""
        if is_read_only(self.application):
            raise Refused(403, "Flower runs in read-only mode")
        by = f"{self._user()} (Flower)"
        logger.info("%s: %s by %s", self.request.path, self.request.method, by)
        work = partial(self.perform, *arguments, by=by)
        self.write(await IOLoop.current().run_in_executor(self.application.executor, work))

    def _user(self) -> str:
        """Return the user's name: that of OAuth, else that of the basic authentication, which Flower has checked.

        Flower itself keeps no more than "yes" of the latter.
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
        await self.act(verb, group, None if index is None else int(index))

    def perform(self, verb: str, group: str, index: int | None, *, by: str) -> dict[str, Any]:  # type: ignore[override]
        return set_paused(self.feed.sharding, verb, group, index, by=by)


class ReplayApi(_Action):
    """`POST /api/shards/GROUP/dead-letters/replay`: all letters, or those in a body `{"ids": ["3f…"]}`."""

    @web.authenticated
    async def post(self, group: str) -> None:
        await self.act(group, self._ids())

    def perform(self, group: str, ids: list[str] | None, *, by: str) -> dict[str, Any]:  # type: ignore[override]
        return replay(self.feed.sharding, group, ids, by=by)

    def _ids(self) -> list[str] | None:
        if not self.request.body:
            return None
        try:
            ids = json.loads(self.request.body)["ids"]
        except (ValueError, KeyError, TypeError):
            ids = None
        if not isinstance(ids, list) or not ids or not all(isinstance(each, str) for each in ids):
            raise Refused(400, 'send no body for all letters, or one such as {"ids": ["3f9c…"]}')
        return ids
