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

from celery_sharding.worker.delivery import Delivery
from celery_sharding.worker.request import DELIVERY
from celery_sharding.worker.runs import Runs


class Intake:
    """Receives the messages of all shards of one worker.

    Args:
        sharded: Task name → group name, of the tasks this worker runs from shards.
    """

    def __init__(self, consumer: Any, runs: Runs, sharded: dict[str, str]) -> None:
        self._consumer = consumer
        self._runs = runs
        self._sharded = sharded
        self._made: list[Any] = []

    def take_request(self, request: Any) -> None:
        """Take the request that a strategy made; `receive` admits it when the strategy has returned."""
        self._made.append(request)

    def receive(self, delivery: Delivery) -> None:
        """Admit one message to its lane, or bury it. One that is revoked or expired is settled already."""
        made, self._made = self._made, []
        self._make_request(delivery)
        made, self._made = self._made, made
        for request in made:
            self._runs.admit(request)

    def _make_request(self, delivery: Delivery) -> None:
        message, headers = delivery.message, delivery.headers
        message.delivery_info[DELIVERY] = delivery
        payload = None
        name = headers.get("task")
        problem = None
        try:
            if name is None:
                payload = message.decode()  # protocol 1 names its task in the body
                name = payload["task"]
            problem = self._find_problem(name, delivery)
            if problem is None:
                self._call_strategy(name, message, payload)
        except DecodeError as exc:
            self._runs.bury_delivery(delivery, reason="cannot be decoded", error=repr(exc))
        except ContentDisallowed as exc:
            self._runs.bury_delivery(delivery, reason="content type is not in accept_content", error=repr(exc))
        except (InvalidTaskError, LookupError, TypeError, ValueError, AttributeError) as exc:
            # Anybody may publish here; Celery's code raises these on a message that is no task message.
            self._runs.bury_delivery(delivery, reason="is no task message", error=repr(exc))
        if problem is not None:
            failure = None if name in self._consumer.strategies else NotRegistered(problem)
            self._runs.bury_delivery(delivery, reason=problem, failure=failure)

    def _find_problem(self, name: str, delivery: Delivery) -> str | None:
        if name not in self._consumer.strategies:
            return f"task {name!r} is not registered in this worker"
        group = delivery.shard.group.name
        if self._sharded.get(name) != group:
            return f"task {name!r} does not belong to the group {group!r} in this worker's configuration"
        if delivery.headers.get("eta"):
            return "eta cannot keep the order of a key"
        return None

    def _call_strategy(self, name: str, message: Any, payload: Any) -> None:
        consumer = self._consumer
        bucket = consumer.task_buckets[name]
        consumer.task_buckets[name] = None
        try:
            consumer.strategies[name](message, payload, _unused, _unused, consumer.on_task_message)
        finally:
            consumer.task_buckets[name] = bucket


def _unused(*_: Any) -> None:
    """Stand in for Celery's acknowledgement; sharded requests settle through their delivery."""
