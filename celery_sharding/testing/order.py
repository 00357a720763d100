"""The order checker: what ran, compared with what was published.

Tasks under test write a line at their start and at their end into a trace, a file that any number of processes append
to. `check_order` reads it and says what was lost, repeated, overlapping or out of order, with the first example of each
in words; `find_violations` tells each of them, for those who want to know more.

A trace is read line by line, and no mark is kept longer than it takes; what a check remembers is a number for each
message. Counting goes on from where the last count ended, so it may be asked often of a long trace.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
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


@dataclass(frozen=True, slots=True)
class Violation:
    """One message that was "repeated", "overlapping" or "out of order", in words.

    `mark` is what broke the rule: the second end, the end of the run that another was started beside, the start that
    came too late. `other` is the start of its key that it came after.
    """

    kind: str
    mark: Mark
    other: Mark
    text: str


class Trace:
    """Where runs leave their marks. Safe for many processes: each mark is one append. To be read by one thread."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = 0
        self._counted: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))

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
        return list(self.scan())

    def scan(self) -> Iterator[Mark]:
        """Return all marks so far, one at a time."""
        for mark, _ in self._scan_from(0):
            yield mark

    def wait_for(self, count: int, *, kind: str = "end", timeout_seconds: float = 60.0) -> bool:
        """Wait until `count` different messages have a mark of `kind`; False if it takes too long."""
        return wait_until(lambda: self.count(kind) >= count, timeout_seconds=timeout_seconds)

    def count(self, kind: str = "end") -> int:
        """Return how many different messages have a mark of `kind`."""
        for mark, offset in self._scan_from(self._offset):
            self._counted[mark.kind][mark.key].add(mark.number)
            self._offset = offset
        return sum(map(len, self._counted[kind].values()))

    def _scan_from(self, offset: int) -> Iterator[tuple[Mark, int]]:
        """Return the marks from `offset` on, each with the offset behind it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # somebody is writing it
                offset += len(line)
                yield Mark(*json.loads(line)), offset


def find_violations(marks: Iterable[Mark], ends: defaultdict[str, Counter[int]]) -> Iterator[Violation]:
    """Tell what is wrong with the runs that left `marks`, and count their ends by key and number into `ends`.

    The rules are those of `check_order`.
    """
    latest: dict[str, Mark] = {}
    furthest: dict[str, Mark] = {}
    for mark in marks:
        message = f"{mark.key!r} number {mark.number}"
        of_key = ends[mark.key]
        if mark.kind == "start":
            ahead = furthest.get(mark.key)
            if ahead is None or mark.number >= ahead.number:
                furthest[mark.key] = mark
            elif not of_key[mark.number]:
                yield Violation("out of order", mark, ahead, f"{message} started after number {ahead.number}")
            latest[mark.key] = mark
        elif mark.kind == "end":
            of_key[mark.number] += 1
            last = latest[mark.key]
            if of_key[mark.number] > 1:
                yield Violation("repeated", mark, last, f"{message} ended {of_key[mark.number]} times")
            if last.run != mark.run:
                yield Violation("overlapping", mark, last, f"{message} ended after number {last.number} had started")


def check_order(trace: Trace, published: Iterable[tuple[object, int]]) -> Verdict:
    """Compare a trace with the messages published, (key, number) in their order of publishing.

    Numbers of a key must rise. Starting a message again that has ended is a repetition, no matter what ran since. Runs
    overlap if another of the key started before one that came to its end; a run that died says nothing of when.
    """
    ends: defaultdict[str, Counter[int]] = defaultdict(Counter)
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def note(name: str, text: str) -> None:
        counts[name] += 1
        examples.setdefault(name, text)

    for violation in find_violations(trace.scan(), ends):
        note(violation.kind, violation.text)
    for key, number in published:
        counts["published"] += 1
        # Asking a counter does not add to it.
        if not ends[str(key)][number]:
            note("lost", f"{str(key)!r} number {number} never ended")
    return Verdict(
        published=counts["published"],
        ended=sum(map(len, ends.values())),
        lost=counts["lost"],
        repeated=counts["repeated"],
        overlapping=counts["overlapping"],
        out_of_order=counts["out of order"],
        examples=examples,
    )
