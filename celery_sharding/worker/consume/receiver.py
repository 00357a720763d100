"""From a message of a shard queue to a request in a lane, or to the dead-letter queue.

Celery's strategies build the request, check revokes and expiry, and tell signals and events, as for any message; two
things differ. A rate limit does not take the message out of its place: the bucket is hidden from the strategy, and the
lane asks it when the message is at its head. And what cannot run is not dropped: it becomes a dead letter with its
reason, and the shard goes on.
"""

from __future__ import annotations

from typing import Any

from celery.exceptions import InvalidTaskError, NotRegistered
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.serialization import prepare_accept_content

from celery_sharding.celery_hooks.rate_limits import Buckets
from celery_sharding.celery_hooks.requests import DELIVERY
from celery_sharding.wire import UNREADABLE_HEADER
from celery_sharding.worker.consume.message_check import find_flaw
from celery_sharding.worker.executor import Executor
from celery_sharding.worker.run.delivery import Delivery


class Intake:
    """Receives the messages of all shards of one worker.

    Args:
        sharded: Task name → group name, of the tasks this worker runs from shards.
    """

    def __init__(self, consumer: Any, executor: Executor, sharded: dict[str, str]) -> None:
        self._consumer = consumer
        self._executor = executor
        self._sharded = sharded
        self._made: list[Any] = []
        self._accept = prepare_accept_content(consumer.app.conf.accept_content)
        self._buckets = Buckets(consumer)

    def take_request(self, request: Any) -> None:
        """Take the request that a strategy made; `receive` admits it when the strategy has returned."""
        self._made.append(request)

    def receive(self, delivery: Delivery) -> None:
        """Admit one message to its lane, or bury it. One that is revoked or expired is settled already."""
        made, self._made = self._made, []
        self._make_request(delivery)
        made, self._made = self._made, made
        for request in made:
            self._executor.admit(request)

    def _make_request(self, delivery: Delivery) -> None:
        message = delivery.message
        message.delivery_info[DELIVERY] = delivery, self._executor
        message.accept = self._accept
        try:
            problem = self._try_to_make_request(delivery)
        except DecodeError as exc:
            self._executor.failures.bury_delivery(delivery, reason="cannot be decoded", error=repr(exc))
        except ContentDisallowed as exc:
            self._executor.failures.bury_delivery(
                delivery, reason="content type is not in accept_content", error=repr(exc)
            )
        except NotRegistered as exc:
            self._executor.failures.bury_delivery(delivery, reason=exc.args[0], failure=exc)
        except tuple(self._consumer.connection_errors):
            raise  # of the worker's own connection: no fault of the message, which is delivered again
        except Exception as exc:
            # Anybody may publish here; there is no telling what Celery's code raises on a message that is no task's.
            self._made.clear()
            self._executor.failures.bury_delivery(delivery, reason="is no task message", error=repr(exc))
        else:
            if problem is not None:
                self._executor.failures.bury_delivery(delivery, reason=problem)

    def _try_to_make_request(self, delivery: Delivery) -> str | None:
        """Make the request of a message, or return why there is none."""
        message, headers = delivery.message, delivery.headers
        if UNREADABLE_HEADER in headers:
            return f"its properties cannot be read: {headers[UNREADABLE_HEADER]}"
        if message.errors:
            raise DecodeError(f"it cannot be decompressed: {message.errors[0][1]!r}")
        if delivery.key_problem is not None:
            return delivery.key_problem
        name, body = headers.get("task"), None
        try:
            payload = message.decode()
        except (DecodeError, ContentDisallowed):
            raise
        except Exception as exc:
            raise DecodeError(repr(exc)) from exc  # a deep nesting is a RecursionError
        if name is None:
            name, body = payload["task"], payload  # protocol 1 names its task in the body
            described = body
        else:
            described = {**payload, **headers} if isinstance(payload, dict) else headers
        flaw = find_flaw(described, payload)
        if flaw is not None:
            raise InvalidTaskError(flaw)
        consumer, group = self._consumer, delivery.place.group.name
        if name not in consumer.strategies:
            raise NotRegistered(f"task {name!r} is not registered in this worker")
        if self._sharded.get(name) != group:
            return f"task {name!r} does not belong to the group {group!r} in this worker's configuration"
        if headers.get("eta") or (isinstance(payload, dict) and payload.get("eta")):
            return "eta cannot keep the order of a key"
        self._buckets.are_hidden = True
        try:
            consumer.strategies[name](message, body, _unused, _unused, consumer.on_task_message)
        finally:
            self._buckets.are_hidden = False
        return None


def _unused(*_: Any) -> None:
    """Stand in for Celery's acknowledgement; sharded requests settle through their delivery."""
