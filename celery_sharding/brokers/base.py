"""What a broker does for groups."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from celery_sharding.config import ShardGroup
from celery_sharding.layout.model import Layout
from celery_sharding.publish.message import Outgoing

if TYPE_CHECKING:
    # Publishers go without what only workers need: it takes a third of the time of the import.
    from celery_sharding.worker.log import Log, Poster


class Backing(Protocol):
    """A broker that groups can live on.

    Attributes:
        has_logs: Manifest, journal and attempts exist: a group can be resharded, looked at and tailed.
    """

    has_logs: bool

    def publish(self, message: Outgoing) -> None:
        """Publish one message and return when it is stored."""

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        """Make the group ready for workers and return its layout; remove what it left behind if `known` is given."""

    def join_group(self, consumer: Any, group: ShardGroup) -> Any:
        """Make the worker of `consumer` one of the group's, and return what its shards open their channels on."""

    def require_logs(self, what: str) -> None:
        """Raise `UnsupportedBroker`, saying that `what` needs them, if the broker keeps no logs."""

    def open_log(self, calls: Poster, *, inline: AbstractContextManager[None] | None) -> Log:
        """Return what a worker writes to: beside it, or, if `inline` is given, while the caller waits, within that."""
