"""What a check takes, and what it yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from celery_sharding.config import ShardGroup
from celery_sharding.errors import TopologyError
from celery_sharding.layout.model import Layout
from celery_sharding.monitoring.status import GroupStatus
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.topology import Names

Severity = Literal["error", "warning", "note", "ok"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. `fix` is what to do about it, "" if there is nothing to do."""

    severity: Severity
    check: str
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """A group that is examined.

    Attributes:
        connection: Of kombu, connected.
        connect: Makes another, for what the broker may answer by closing it.
        group: As it is configured.
        layout: As the manifest says.
        status: As the snapshot says.
    """

    connection: Any
    connect: Connect
    group: ShardGroup
    layout: Layout
    status: GroupStatus

    @property
    def names(self) -> Names:
        return Names(self.group.name)


def unchecked(check: str, exc: TopologyError) -> Finding:
    return Finding(
        "note", check, f"not checked: {exc.message.split(' (')[0]}", "run it as a user with permission to declare"
    )
