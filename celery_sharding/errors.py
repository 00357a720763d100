"""Every error this library raises, in one tree.

Each message says what is wrong, where, and what to do about it. Attributes give programs the same facts. All survive
pickling, because Celery carries the errors of a task from process to process.
"""

from __future__ import annotations

from typing import Any


class ShardingError(Exception):
    """Root of all errors of celery-sharding."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["facts"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.facts)

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[ShardingError], message: str, facts: dict[str, Any]) -> ShardingError:
    return cls(message, **facts)


# --- configuration and calls -----------------------------------------------------------------------------------------


class ConfigurationError(ShardingError):
    """A group, a route or a setting is wrong; found when the configuration is read."""


class UnknownGroup(ConfigurationError):
    """A group was named that does not exist. `group`."""


class UnknownShard(ConfigurationError):
    """A shard was named that the group does not have. `group`, `index`, `shards`."""


class ShardKeyError(ShardingError):
    """A sharded task was called without a usable key; nothing was published. `task`."""


class UnsupportedOption(ShardingError):
    """An option that cannot keep the order was given to a sharded task; nothing was published. `task`, `option`."""


# --- publishing ------------------------------------------------------------------------------------------------------


class PublishError(ShardingError):
    """A sharded task was not confirmed by the broker. `task_id`, `group`."""


class Unroutable(PublishError):
    """The broker returned the message because no queue takes it. It was not stored."""


class PublishRefused(PublishError):
    """The broker refuses the user or the message, or AMQP cannot carry it; a retry is useless. It was not stored."""


class Nacked(PublishError):
    """The broker refused the message, on a new channel as well. It was not stored."""


class BackendUnavailable(PublishError):
    """The result backend, which Celery asks before it publishes, did not answer. Nothing was sent."""


class OutcomeUnknown(PublishError):
    """The message was sent, but never confirmed: it may be stored or not. It was not sent again."""


class BrokerBlocked(PublishError):
    """The broker blocks publishers (memory or disk alarm). Nothing was sent."""


class BrokerUnavailable(PublishError):
    """The broker could not be reached. Nothing was sent."""


# --- the broker's side -----------------------------------------------------------------------------------------------


class TopologyError(ShardingError):
    """The group's queues, exchanges or logs on the broker cannot be used. `group`."""


class TopologyMismatch(TopologyError):
    """Queues or exchanges of the group exist with other arguments."""


class PluginMissing(TopologyError):
    """The consistent-hash exchange plugin is not enabled on the broker."""


class TooFewChannels(TopologyError):
    """The broker allows fewer channels on a connection than a worker needs for its shards. `needed`, `allowed`."""


class UnsupportedBroker(TopologyError):
    """The transport or broker version cannot keep the guarantees."""


class OutOfReach(TopologyError):
    """A queue of the group is on a broker node that is down or starting; this passes by itself."""


class LockHeld(TopologyError):
    """Another process holds the group's topology lock."""


class LockLost(TopologyError):
    """The connection that holds the group's topology lock was lost; the next holder goes on."""


class LogError(TopologyError):
    """The manifest or the journal could not be read or written. `passes`: a retry may work."""


class ManifestConflict(LogError):
    """The manifest has changed since it was read; nothing was written. Read it again and decide anew."""


class ManagementUnavailable(ShardingError):
    """The broker's management API did not answer; only what is shown depends on it. `url`."""


class ProtocolTooOld(TopologyError):
    """A newer version uses the group in a way that this one does not know. `group`, `needed`, `known`."""


class GroupInUse(TopologyError):
    """A group to be removed has messages, or workers follow it. `obstacles`."""


class DeadLetterError(ShardingError):
    """A named dead letter does not exist, or cannot be replayed; nothing was done. `ids`."""


class DeadLettered(ShardingError):
    """The message became a dead letter before its task ran; the text says why. It is the result of such a task."""


# --- deduplication ---------------------------------------------------------------------------------------------------


class DeduplicationError(ShardingError):
    """Root of the errors of `@deduplicate`."""


class NoUsableStore(DeduplicationError):
    """The result backend cannot keep claims. `backend`."""


class StoreUnavailable(DeduplicationError):
    """The claim store did not answer; the task did not run unclaimed. `key`."""


class StoreRefused(StoreUnavailable):
    """The claim store refused: its user lacks a right, or it is read-only. `key`."""


class ClaimLost(DeduplicationError):
    """The claim lapsed and was taken over; this run's commit was refused. `key`."""


class ClaimHeld(DeduplicationError):
    """Another run holds the claim. `key`."""


class DamagedRecord(DeduplicationError):
    """A claim record is damaged, or a newer version wrote it; it was kept as it is. `key`."""
