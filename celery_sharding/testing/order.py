"""The order checker: compares what ran with what was published.

Tasks under test append a line to a trace, a file, at their start and at their end; any number of processes may do so.
`check_order` reads it and reports what was lost, repeated, overlapping or out of order, with the first example of each;
`find_violations` yields every case.

A trace is read line by line; a check keeps only a number for each message. `Trace.count` goes on where it last ended,
so it is cheap to repeat on a long trace.
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
    """The start or end of a run of message `number` of `key`; `at` in seconds since the epoch."""

    kind: str
    key: str
    number: int
    run: str
    at: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many messages were lost, ended more than once, ran beside another of their key, or started too early."""

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
    """One message that was "repeated", "overlapping" or "out of order", described in `text`.

    `mark` broke the rule: the second end, the end of a run beside which another started, or the start that came too
    late. `other` is the start of its key that came before it.
    """

    kind: str
    mark: Mark
    other: Mark
    text: str


class Trace:
    """The file of marks. Any number of processes may write, as each mark is one append; only one thread may read."""

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
        """Append one mark; tests may use other kinds than "start" and "end" as they like."""
        line = json.dumps([kind, str(key), number, run, time.time()]) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def read(self) -> list[Mark]:
        """Return all marks so far, in the order they were made."""
        return list(self.scan())

    def scan(self) -> Iterator[Mark]:
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
        """Yield the marks from `offset` on, each with the offset after it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                offset += len(line)
                yield Mark(*json.loads(line)), offset


def find_violations(marks: Iterable[Mark], ends: defaultdict[str, Counter[int]]) -> Iterator[Violation]:
    """Yield what is wrong with `marks` by the rules of `check_order`, and count ends by key and number in `ends`."""
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
    """Compare a trace with the published messages, (key, number) in the order they were published.

    Numbers of a key must rise. A message that starts again after it ended is a repetition, whatever ran since. Runs
    overlap if another of the key started before one ended; a run that died has no end.
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
