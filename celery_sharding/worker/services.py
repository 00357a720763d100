"""What every part of a worker that consumes shards works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from celery_sharding.worker.executor import Executor
from celery_sharding.worker.log import Log
from celery_sharding.worker.ports import Calls
from celery_sharding.worker.run.delivery import Delivery


class Receiver(Protocol):
    """Takes what the shards are delivered."""

    def receive(self, delivery: Delivery) -> None:
        """Admit one message to its lane, or bury it."""


@dataclass(frozen=True, slots=True)
class WorkerServices:
    """The services of one worker.

    Attributes:
        node: The worker's name.
        hold_seconds: How long a message may be held where the broker alone sets the time-out of consumers.
    """

    node: str
    log: Log
    calls: Calls
    executor: Executor
    receiver: Receiver
    hold_seconds: float
