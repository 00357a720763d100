"""The dead letters of a group: list, replay, discard.

    dead ──replay──▶ published to the group again, under its key ──confirmed──▶ acknowledged: gone from the queue
    dead ──discard──▶ acknowledged: gone from the queue

Listing takes letters without acknowledging them and closes its channel, which requeues them. Meanwhile nobody else sees
them, so all three take turns under a lock of their own: thousands of letters take a while, and pausing or repairing the
group must not wait for that. Workers write letters at any time; one that comes after an action has begun is left alone.
Letters that another reader holds, such as the management page, are waited for briefly.

A process that is killed between confirm and acknowledgement leaves a letter that was replayed. It may be replayed
again, under its task id, by which `@deduplicate` recognizes it. Nothing is ever lost. Letters of one key are replayed
in the order in which they died, which is the order in which they were published; their successors have run long ago.

Every action is recorded in the manifest when it begins and when it ends (`audit`), without keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from celery_sharding.celery_hooks.foreign import read_foreign
from celery_sharding.config import ShardGroup
from celery_sharding.errors import BrokerUnavailable, DeadLetterError, LockLost, TopologyError
from celery_sharding.layout.lock import GroupLock, not_declared
from celery_sharding.operations.audit import Operation, recorded
from celery_sharding.operations.letters import DeadLetter, read_letter, revive
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.confirms import Confirms, publish_batch
from celery_sharding.rabbitmq.connect import Connect
from celery_sharding.rabbitmq.queues import queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import Names

# Letters of one action, all held in memory; the rest is left to the next action.
LETTERS_MAX = 50_000
_LOCK_SECONDS = 10.0
# What another reader has requeued comes a moment later.
_LOOK_AGAIN_SECONDS, _WAIT_SECONDS = 0.1, 3.0
_BATCH = 200
_NOTED_IDS_MAX = 100
_DONE = "{} of {} done"


class Progress(Protocol):
    """Is told how far a replay is."""

    def note(self, done: int, of: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Listing:
    """Letters from the front of the queue, and how many `more` there are behind them."""

    letters: tuple[DeadLetter, ...]
    more: int


def read_dead(connect: Connect, group: str, *, limit: int) -> Listing:
    """Read the first `limit` dead letters of a group, which stay where they are.

    Not for a loop: it takes the lock of dead letters and about a millisecond for each, and the broker counts a delivery
    of each. A snapshot shows how many there are.

    Raises:
        LockHeld: Another process held the lock all the time.
        TopologyError: The group has no dead-letter queue, or this user may not read it.
        BrokerUnavailable: The broker could not be reached, or was lost.
    """
    with _locked(connect, Names(group)) as connection, brief_channel(connection) as channel:
        return _take(channel, Names(group), limit=limit)


def replay(
    connect: Connect,
    group: ShardGroup,
    ids: Collection[str] | None,
    *,
    by: str,
    progress: Progress | None = None,
) -> list[DeadLetter]:
    """Publish dead letters to their group again, and return them in the order in which that was done.

    Args:
        ids: Of the letters; None for all that have a key.
        progress: Told of each batch.

    Raises:
        DeadLetterError: There is no such letter, or it has no key; none was replayed.
        TopologyError: The broker did not take one. Those before it were replayed, and the history says how many.
        Others as for `read_dead`.
    """
    names = Names(group.name)
    with _locked(connect, names) as connection, brief_channel(connection) as source:
        taken = _choose(source, names, ids)
        keyless = [each.id for each in taken if not each.key]
        if keyless and ids is not None:
            raise DeadLetterError(
                f"{', '.join(keyless)}: without a shard key, since no worker wrote it; it can only be discarded",
                ids=tuple(keyless),
            )
        taken = sorted((each for each in taken if each.key), key=lambda each: each.dead_at or 0.0)
        done: list[DeadLetter] = []
        with (
            _recorded(connection, names, "replay", taken, by=by) as operation,
            brief_channel(connection) as target,
        ):
            confirms: Confirms[int] = Confirms(target)
            for batch in _split(taken):
                stored = _publish(confirms, names, batch)
                for each in stored:
                    source.basic_ack(each.tag)
                done += stored
                operation.result = _DONE.format(len(done), len(taken))
                if progress is not None:
                    progress.note(len(done), len(taken))
                if len(stored) < len(batch):
                    raise TopologyError(
                        f"the broker did not store {len(batch) - len(stored)} of the letters; they are still there. "
                        "Run `celery shards declare`, then replay the rest",
                        group=names.group,
                    )
            _await_acknowledged(source)
    return done


def discard(
    connect: Connect,
    group: str,
    ids: Collection[str] | None,
    *,
    by: str,
) -> list[DeadLetter]:
    """Throw dead letters away for good, and return them. Arguments and errors as for `replay`."""
    names = Names(group)
    with _locked(connect, names) as connection, brief_channel(connection) as source:
        taken = _choose(source, names, ids)
        with _recorded(connection, names, "discard", taken, by=by) as operation:
            for done, each in enumerate(taken, start=1):
                source.basic_ack(each.tag)
                operation.result = _DONE.format(done, len(taken))
            _await_acknowledged(source)
    return taken


@contextlib.contextmanager
def _locked(connect: Connect, names: Names) -> Iterator[Any]:
    try:
        with (
            GroupLock(connect, names, timeout_seconds=_LOCK_SECONDS, queue=names.dead_admin) as lock,
            lock.operation() as connection,
        ):
            if not queue_exists(connection, names.dead):
                raise not_declared(names.group)
            yield connection
    except LockLost as exc:
        raise BrokerUnavailable(
            f"the broker was lost ({exc.__cause__}); letters that were replayed just before may still be in the queue, "
            "and would run twice if they are replayed again",
            group=names.group,
        ) from exc


def _take(channel: Any, names: Names, *, limit: int, wanted: Collection[str] | None = None) -> Listing:
    """Take letters from the front of the queue, up to `limit` or until all that are `wanted` are found."""
    read_foreign(channel)  # bodies as they are
    found: list[DeadLetter] = []
    missing = set(wanted or ())
    seen: Counter[str] = Counter()
    more = 0
    looks_until = time.monotonic() + (_LOOK_AGAIN_SECONDS if wanted is None else _WAIT_SECONDS)
    with explained(names.group, names.dead):
        while len(found) < limit and (wanted is None or missing):
            message = channel.basic_get(names.dead)
            if message is None:
                more = 0
                if time.monotonic() >= looks_until:
                    break
                time.sleep(_LOOK_AGAIN_SECONDS)
                continue
            more = int(message.delivery_info["message_count"])
            letter = read_letter(message, names)
            seen[letter.id] += 1
            if seen[letter.id] > 1:
                letter = dataclasses.replace(letter, id=f"{letter.id}.{seen[letter.id]}")
            found.append(letter)
            missing.discard(letter.id)
    return Listing(tuple(found), more)


def _choose(channel: Any, names: Names, ids: Collection[str] | None) -> list[DeadLetter]:
    """Take the letters called `ids`, or all; what else is taken is given back with the channel."""
    taken = _take(channel, names, limit=LETTERS_MAX, wanted=ids).letters
    if ids is None:
        return list(taken)
    missing = sorted(set(ids) - {each.id for each in taken})
    if missing:
        raise DeadLetterError(
            f"no such dead letter in group {names.group!r}: {', '.join(missing)}; it may have been replayed or "
            "discarded meanwhile. Nothing was done",
            ids=tuple(missing),
        )
    return [each for each in taken if each.id in ids]


def _split(taken: Sequence[DeadLetter]) -> Iterator[list[DeadLetter]]:
    """Yield batches in order, none with two letters of a key: if the first were refused, the second would pass it."""
    batch: list[DeadLetter] = []
    keys: set[str | None] = set()
    for each in taken:
        if each.key in keys or len(batch) == _BATCH:
            yield batch
            batch, keys = [], set()
        batch.append(each)
        keys.add(each.key)
    if batch:
        yield batch


def _publish(confirms: Confirms[int], names: Names, batch: Sequence[DeadLetter]) -> list[DeadLetter]:
    """Publish the letters of a batch; return those that were stored."""
    at = time.time()
    letters = [(revive(each, names.group, at=at), names.publish, str(each.key)) for each in batch]
    refused = publish_batch(confirms, letters)
    return [each for position, each in enumerate(batch) if position not in refused]


def _await_acknowledged(channel: Any) -> None:
    """Wait until the broker has processed the acknowledgements, as its answer to any later call shows."""
    channel.basic_qos(0, 1, False)


@contextlib.contextmanager
def _recorded(connection: Any, names: Names, verb: str, taken: Sequence[DeadLetter], *, by: str) -> Iterator[Operation]:
    """Write to the history what becomes of `taken`; nothing if there is none."""
    none_done = _DONE.format(0, len(taken))
    if not taken:
        yield Operation(none_done)
        return
    facts = {"count": len(taken), "ids": [each.id for each in taken[:_NOTED_IDS_MAX]]}
    with recorded(connection, names, verb, by=by, result=none_done, facts=facts) as operation:
        yield operation
