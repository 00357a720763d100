"""A publisher of a soak: real accounts in their real order, each by one publisher only, and a note of every outcome.

It publishes as the documentation tells: a message that was not stored is sent again before anything else. After an
unknown outcome a message for the ledger is sent again under the same task id, and only then the next. Without a claim
that is committed with its row that would not be safe, so the publisher leaves the key alone for good and goes on with a
fresh one for the account.

Notes, one line each: [outcome, group, key, number, seconds since the epoch]; "confirmed" is written when the call has
returned, "unknown" when it raised `OutcomeUnknown`, "refused" when nothing was stored.
"""

from __future__ import annotations

import csv
import json
import sys
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TextIO

import click

from celery_sharding.errors import OutcomeUnknown, ShardingError
from soak.plan import GROUPS
from soak.shop import TASKS

EVENTS = Path(__file__).resolve().parents[2] / "examples" / "data" / "events.csv"
_PAUSE_SECONDS = 0.2
# How long after its time a publisher goes on trying to send what it is at.
_LATE_SECONDS = 90.0
# None has a divisor in common with the number of groups, so that they meet all of them.
_DUPLICATE_EVERY, _RETRY_EVERY, _FAILURE_EVERY, _LONG_EVERY = 21, 47, 59, 151


@click.command()
@click.option("--number", type=int, required=True, help="From 1.")
@click.option("--publishers", type=int, required=True)
@click.option("--rate", type=float, required=True, help="Messages a second of all publishers.")
@click.option("--seconds", type=float, required=True, help="How long, from its first message on.")
@click.option("--notes", type=click.File("a"), required=True)
def main(number: int, publishers: int, rate: float, seconds: float, notes: TextIO) -> None:
    began = time.time()
    until = began + seconds
    publisher = _Publisher(notes, until + _LATE_SECONDS)
    for position, account in enumerate(read_accounts()):
        due = began + position / rate
        if due > until:
            return
        if zlib.crc32(account.encode()) % publishers != number - 1:
            continue
        time.sleep(max(0.0, due - time.time()))  # the pace
        if time.time() > until:
            return
        publisher.publish(account, position)


def read_accounts() -> Iterator[str]:
    """Return the accounts of the real events, over and over."""
    with EVENTS.open(newline="") as file:
        accounts = [row["account"] for row in csv.DictReader(file)]
    for position in count():
        yield accounts[position % len(accounts)]


class _Publisher:
    def __init__(self, notes: TextIO, deadline: float) -> None:
        self._notes = notes
        self._deadline = deadline
        self._names: Counter[str] = Counter()

    def publish(self, account: str, position: int) -> None:
        """Publish message number `position` of an account to one of the groups."""
        group = GROUPS[position % len(GROUPS)]
        copies = 2 if group in ("ledger", "once") and position % _DUPLICATE_EVERY == 0 else 1
        for _ in range(copies):
            self._send(group, account, position)

    def _send(self, group: str, account: str, position: int) -> None:
        name = f"{group} {account}"
        key = f"{account}#{self._names[name]}"
        kwargs = {
            "key": key,
            "number": position,
            "seconds": 0.4 if position % _LONG_EVERY == 0 else 0.002,
            "retries": int(position % _RETRY_EVERY == 0),
            "fails": position % _FAILURE_EVERY == 0,
        }
        task_id = str(uuid.uuid4())
        while time.time() < self._deadline:
            try:
                TASKS[group].apply_async(kwargs=kwargs, task_id=task_id)
            except OutcomeUnknown:
                self._note("unknown", group, key, position)
                if group != "ledger":
                    self._names[name] += 1
                    return
            except ShardingError as error:
                self._note("refused", group, key, position, f"{type(error).__name__}: {error}")
                time.sleep(_PAUSE_SECONDS)  # so that a broker that is down is not asked without end
            else:
                self._note("confirmed", group, key, position)
                return
        sys.exit(f"{key} number {position} could not be published")

    def _note(self, outcome: str, group: str, key: str, number: int, *more: str) -> None:
        self._notes.write(json.dumps([outcome, group, key, number, time.time(), *more]) + "\n")
        self._notes.flush()


if __name__ == "__main__":
    main()
