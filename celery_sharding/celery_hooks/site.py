"""The worker that the hooks are installed in, and what of ours they call, behind narrow protocols."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Pool(Protocol):
    """The worker's pool; `pool.WorkerPool` says what these mean."""

    has_children: bool
    is_green: bool
    is_solo: bool

    def stop(self) -> None:
        """The worker stops: start nothing more."""


class Nodes(Protocol):
    """The nodes of the worker's broker."""

    first_node: int  # where the next connect begins, counted from that of the URL

    def leave_node(self) -> None:
        """The connection is lost: begin with the next node."""

    def forget_sockets(self) -> None:
        """The connection is lost: let the event loop forget all sockets."""


class Watcher(Protocol):
    """Watches the main thread of a worker."""

    def connecting(self) -> None:
        """The worker is about to connect; its pool has forked."""

    def turned(self) -> None:
        """Celery's loop for pools without an event loop has come round."""


class Requests(Protocol):
    """Takes the requests that Celery's strategies make."""

    def take_request(self, request: Any) -> None:
        """Take the request of a message from a shard."""


class Strays(Protocol):
    """Looks at the requests of messages from ordinary queues."""

    def note(self, request: Any) -> None:
        """Look at one before Celery starts it."""


class PoolRuns(Protocol):
    """The sharded runs that the pool has."""

    def stop(self) -> None:
        """Start nothing more."""

    def unaccepted(self) -> Collection[Any]:
        """Return the runs that no process of the pool has begun, as far as is known."""


class Shards(Protocol):
    """The shards that a worker consumes, as remote control sees them."""

    def freeze(self) -> None:
        """Start nothing more of them."""

    def cancel_shards(self, group: str, index: int | None) -> bool:
        """Give up a shard of a group, or all of it; False: there was none."""

    def add_shards(self, group: str, index: int | None, *, by_name: bool) -> frozenset[int] | None:
        """Consume a shard of a group, or all of it; return which of what was asked for it consumes then."""

    def roles(self) -> Mapping[str, Mapping[str, str]]:
        """Return by group what this worker is to each of its queues."""


@dataclass(frozen=True, slots=True)
class WorkerSite:
    """One worker, and what its hooks need.

    Attributes:
        consumer: Celery's.
        heartbeat_seconds: What the worker asks for on its connection.
        reads_more: In each round of a loop for greenlets, all that has come is read.
        sharded: Task name → group name, of the tasks that this worker runs from shards.
        watchers: Told of each connect and each round; whoever is added later is told later.
        around_tasks: Entered while a solo pool runs a task; the first is the outermost.
    """

    consumer: Any
    pool: Pool
    connection: Nodes
    requests: Requests
    strays: Strays
    runs: PoolRuns
    shards: Shards
    heartbeat_seconds: float
    reads_more: bool
    sharded: Mapping[str, str]
    watchers: list[Watcher] = field(default_factory=list)
    around_tasks: list[AbstractContextManager[Any]] = field(default_factory=list)
