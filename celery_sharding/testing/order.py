"""The order checker: what ran, compared with what was published.

Tasks under test write a line at their start and at their end into a trace, a file that any number of processes append
to. `check_order` reads it and says what was lost, repeated, overlapping or out of order, with the first example of each
in words.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from celery_sharding.testing.processes import wait_until


@dataclass(frozen=True, slots=True)
class Mark:
    """A start or an end of a run of message number `number` of `key`; `at` in seconds since the epoch."""

    kind: str
    key: str
    number: int
    run: str
    at: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many messages were lost, run to their end more than once, run beside another of their key, or too early."""

    published: int
    ended: int
    lost: int = 0
    repeated: int = 0
    overlapping: int = 0
    out_of_order: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.repeated or self.overlapping or self.out_of_order)

    def __str__(self) -> str:
        counts = (
            f"{self.published} published, {self.ended} ended: {self.lost} lost, {self.repeated} repeated, "
            f"{self.overlapping} overlapping, {self.out_of_order} out of order"
        )
        return "; ".join([counts, *(f"first {name}: {text}" for name, text in self.examples.items())])


class Trace:
    """Where runs leave their marks. Safe for many processes: each mark is one append."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def run(self, key: object, number: int) -> Iterator[None]:
        """Mark the start of a run now, and its end if it ends without an error."""
        run = f"{os.getpid()}-{time.monotonic_ns()}"
        self.mark("start", key, number, run)
        yield
        self.mark("end", key, number, run)

    def mark(self, kind: str, key: object, number: int, run: str = "") -> None:
        """Append one mark; kinds beside "start" and "end" are for the test's own use."""
        line = json.dumps([kind, str(key), number, run, time.time()]) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def read(self) -> list[Mark]:
        """Return all marks so far, in the order in which they were made."""
        if not self.path.exists():
            return []
        return [Mark(*json.loads(line)) for line in self.path.read_text().splitlines()]

    def wait_for(self, count: int, *, kind: str = "end", timeout_seconds: float = 60.0) -> bool:
        """Wait until `count` different messages have a mark of `kind`; False if it takes too long."""
        return wait_until(lambda: self.count(kind) >= count, timeout_seconds=timeout_seconds)

    def count(self, kind: str = "end") -> int:
        """Return how many different messages have a mark of `kind`."""
        return len({(mark.key, mark.number) for mark in self.read() if mark.kind == kind})


def check_order(trace: Trace, published: Iterable[tuple[object, int]]) -> Verdict:
    """Compare a trace with the messages published, (key, number) in their order of publishing.

    Numbers of a key must rise. Starting a message again that has ended is a repetition, no matter what ran since. Runs
    overlap if another of the key started before one that came to its end; a run that died says nothing of when.
    """
    wanted = [(str(key), number) for key, number in published]
    ends: Counter[tuple[str, int]] = Counter()
    latest: dict[str, Mark] = {}
    furthest: dict[str, int] = {}
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def note(name: str, text: str) -> None:
        counts[name] += 1
        examples.setdefault(name, text)

    for mark in trace.read():
        message = f"{mark.key!r} number {mark.number}"
        if mark.kind == "start":
            if mark.number < furthest.get(mark.key, mark.number) and not ends[mark.key, mark.number]:
                note("out of order", f"{message} started after number {furthest[mark.key]}")
            furthest[mark.key] = max(mark.number, furthest.get(mark.key, mark.number))
            latest[mark.key] = mark
        elif mark.kind == "end":
            ends[mark.key, mark.number] += 1
            if ends[mark.key, mark.number] > 1:
                note("repeated", f"{message} ended {ends[mark.key, mark.number]} times")
            if latest[mark.key].run != mark.run:
                note("overlapping", f"{message} ended after number {latest[mark.key].number} had started")
    for key, number in wanted:
        if not ends[key, number]:
            note("lost", f"{key!r} number {number} never ended")
    return Verdict(
        published=len(wanted),
        ended=len(ends),
        lost=counts["lost"],
        repeated=counts["repeated"],
        overlapping=counts["overlapping"],
        out_of_order=counts["out of order"],
        examples=examples,
    )
