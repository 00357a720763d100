"""What a worker knows of earlier attempts and retries of a group's messages, tailed from the attempts stream."""

from __future__ import annotations

import logging
from collections.abc import Callable

from celery_sharding.journal.attempts import Attempt, AttemptLog
from celery_sharding.rabbitmq.streams import NONCE, decode, nonce_event
from celery_sharding.worker.log import Log

logger = logging.getLogger(__name__)


class Attempts:
    """The attempts of one group; complete once everything written before the last `catch_up` was read.

    `stream` is None on an embedded broker, where nothing outlives the worker.
    """

    def __init__(self, stream: str | None, log: Log) -> None:
        self._stream = stream
        self._log = log
        self._known = AttemptLog()
        self.is_complete = stream is None
        self._nonce = ""
        self._waiting: list[Callable[[], None]] = []

    def catch_up(self) -> None:
        """Mark the end of what is to be read: a shard was taken, and its last owner may just have written."""
        if self._stream is not None:
            end = nonce_event()
            self._nonce = end["nonce"]
            self.is_complete = False
            self._log.append(self._stream, end)

    def on_message(self, body: bytes, offset: int) -> None:
        """Take one message of the stream."""
        event = decode(body, stream=str(self._stream), offset=offset)
        if event is None:
            return
        self._known.note(event)
        if event.get("event") == NONCE and event.get("nonce") == self._nonce:
            self.is_complete = True
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                try:
                    call()
                except Exception:
                    logger.exception("a redelivered message could not be judged; it is delivered again later")

    def when_complete(self, call: Callable[[], None]) -> None:
        """Call now, or when everything written before the last `catch_up` was read."""
        if self.is_complete:
            call()
        else:
            self._waiting.append(call)

    def when_written(self, call: Callable[[], None]) -> None:
        """Call when everything written so far is confirmed, since a stream confirms in order."""
        if self._stream is None:
            call()
        else:
            self._log.append(self._stream, nonce_event(), call)

    def get(self, message_id: str) -> Attempt | None:
        return self._known.get(message_id)
