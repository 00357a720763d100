"""What ran in a soak, compared with what was published, and which repetitions a fault explains.

A run is repeated without fault of ours if its first end lies in the moments of a hard fault of its worker or of the
broker: what runs then, or ended just before and was not acknowledged yet, comes again. A fault that leaves a connection
half open lets a worker go on with what another one already has, for some heartbeats: in its window runs of that worker
may overlap and be repeated. A run that ended while its claim could not be written may come again, if nothing but that
claim keeps it from it (group "once"). A run that ended while the result backend was away is held until its end is
stored: a hard fault that comes then repeats it, and if it cannot be stored in time, it is a dead letter that says so.
Any other dead letter is not lost, but fails a soak, with its reason. Nothing explains a message that was lost, came out
of order, or was entered twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from celery_sharding.testing.order import Mark, Trace, find_violations
from soak.plan import HEARTBEAT_SECONDS, STORE_KINDS, Kind

# How late an acknowledgement may reach the broker, and how late a worker that is short of time notices a fault.
LATE_SECONDS = 2.0
HALF_OPEN_SECONDS = 3 * HEARTBEAT_SECONDS
# How long a worker tries to store the end of a run, and what it says then.
UNTOLD_SECONDS = 10.0
UNTOLD_REASON = "its end could not be stored; its body may have run"
LOST_NODE = frozenset({Kind.KILL_NODE, Kind.RESTART_NODE})
HARD = LOST_NODE | {
    Kind.KILL, Kind.KILL_PARENT, Kind.KILL_CHILD, Kind.CUT, Kind.RESTART_BROKER, Kind.KILL_BROKER,
}  # fmt: skip
HALF_OPEN = frozenset({Kind.STALL, Kind.BLACKHOLE, Kind.PAUSE_NODE})
# The target of a fault that hits all workers.
ALL_WORKERS = "broker"
# The group whose runs are single by their claim alone.
CLAIMED = "once"
# A cut is noticed by both sides, but by neither before the other: a short run may end beside its repetition.
MOMENTARY = LOST_NODE | {Kind.CUT}


@dataclass(frozen=True, slots=True)
class Incident:
    """A fault as it happened; `began` and `ended` in seconds since the epoch. The target is a worker or ALL_WORKERS."""

    kind: Kind
    target: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Note:
    """What became of one message, as its publisher was told."""

    outcome: str
    group: str
    key: str
    number: int
    at: float


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, in words; key "" if it cannot be read. `at`, in seconds since the epoch, is when it died."""

    group: str
    key: str
    number: int
    text: str
    reason: str = ""
    at: float = 0.0


@dataclass(slots=True)
class Findings:
    """What is counted, by name, with the first example of each in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, example: str) -> None:
        self.counts[name] += 1
        self.examples.setdefault(name, example)


@dataclass(frozen=True, slots=True)
class Pace:
    """`seconds` from the first confirm to the last end, and `slowest_seconds` from a confirm to its end."""

    seconds: float
    slowest_seconds: float


VIOLATIONS = (
    "lost",
    "out of order",
    "overlapping",
    "repeated",
    "entered twice",
    "entered out of order",
    "dead letters",
    "groups not whole",
    "workers that ended by themselves",
    "workers that did not stop",
    "faults that failed",
)
EXPLAINED = (
    "repeated, in flight at a hard fault",
    "repeated, half-open link",
    "repeated, claim not written",
    "dead letters, end not stored",
    "overlapping, half-open link",
    "overlapping, moment of a cut",
)


TOLD = ("published twice", "refused", "unknown", "unknown that ran")


def is_clean(findings: Findings) -> bool:
    """Say whether nothing happened that may not."""
    return not any(findings.counts[name] for name in VIOLATIONS)


def judge(
    traces: Mapping[str, Trace],
    entries: Iterable[tuple[str, int]],
    notes: Iterable[Note],
    incidents: Sequence[Incident],
    letters: Sequence[Letter] = (),
) -> Findings:
    """Judge a soak.

    Args:
        traces: By group.
        entries: Rows of the ledger, (key, number), in the order in which they were committed.
        notes: What the publishers noted.
        incidents: Every fault that happened.
        letters: What was found in the dead-letter queues.
    """
    findings = Findings()
    windows = Windows(incidents)
    ended: dict[str, Mapping[str, Counter[int]]] = {}
    for group, trace in traces.items():
        ended[group] = _judge_trace(findings, group, trace, windows)
    ended["ledger"] = _judge_ledger(findings, entries)
    for letter in letters:
        findings.note(windows.buries(letter) or "dead letters", letter.text)
    _judge_notes(findings, notes, ended, {(letter.group, letter.key, letter.number) for letter in letters})
    return findings


def measure_pace(traces: Mapping[str, Trace], notes: Iterable[Note]) -> Pace:
    """Return how fast the messages ended that were confirmed."""
    confirmed = {(note.group, note.number): note.at for note in notes if note.outcome == "confirmed"}
    slowest_seconds = last = 0.0
    for group, trace in traces.items():
        for mark in trace.scan():
            at = confirmed.get((group, mark.number))
            if mark.kind == "end" and at is not None:
                last = max(last, mark.at)
                slowest_seconds = max(slowest_seconds, mark.at - at)
    return Pace(max(0.0, last - min(confirmed.values(), default=last)), slowest_seconds)


class Windows:
    """When a fault explains what is forbidden otherwise, by worker."""

    def __init__(self, incidents: Sequence[Incident]) -> None:
        self._incidents = incidents

    def repeats(self, worker: str, at: float) -> str | None:
        """Return what explains that a run of `worker` that ended at `at` came again, None if nothing does."""
        for incident in self._of(worker, HARD):
            if self._beginning(worker, incident) - LATE_SECONDS <= at <= incident.ended + LATE_SECONDS:
                return "repeated, in flight at a hard fault"
        if any(self._is_half_open(incident, at) for incident in self._of(worker, HALF_OPEN)):
            return "repeated, half-open link"
        return None

    def repeats_claimed(self, worker: str, at: float) -> str | None:
        """Return what explains that a run whose claim is all that makes it one came again."""
        for incident in self._of(worker, STORE_KINDS):
            if incident.began - LATE_SECONDS <= at <= incident.ended + LATE_SECONDS:
                return "repeated, claim not written"
        return None

    def buries(self, letter: Letter) -> str | None:
        """Return what explains a dead letter; whose run it was is not known."""
        if letter.reason == UNTOLD_REASON and any(
            incident.began <= letter.at <= incident.ended + UNTOLD_SECONDS + LATE_SECONDS
            for incident in self._incidents
            if incident.kind in STORE_KINDS
        ):
            return "dead letters, end not stored"
        return None

    def overlaps(self, worker: str, at: float) -> str | None:
        """Return what explains that a run of `worker` that ended at `at` had another of its key beside it."""
        if any(self._is_half_open(incident, at) for incident in self._of(worker, HALF_OPEN)):
            return "overlapping, half-open link"
        for incident in self._of(worker, MOMENTARY):
            if incident.began <= at <= incident.ended + LATE_SECONDS:
                return "overlapping, moment of a cut"
        return None

    def _of(self, worker: str, kinds: frozenset[Kind]) -> Iterator[Incident]:
        return (
            incident
            for incident in self._incidents
            if incident.kind in kinds and incident.target in (worker, ALL_WORKERS)
        )

    def _beginning(self, worker: str, incident: Incident) -> float:
        """Return since when nothing may have been acknowledged.

        A worker that stands still acknowledges nothing, nor does one that cannot store how its runs have ended.
        """
        lasting = ((frozenset({Kind.PAUSE}), LATE_SECONDS), (STORE_KINDS, UNTOLD_SECONDS + LATE_SECONDS))
        earlier = [
            other.began
            for kinds, seconds in lasting
            for other in self._of(worker, kinds)
            if other.began <= incident.ended and other.ended >= incident.began - seconds
        ]
        return min([incident.began, *earlier])

    def _is_half_open(self, incident: Incident, at: float) -> bool:
        return incident.began - LATE_SECONDS <= at <= incident.ended + HALF_OPEN_SECONDS


def worker_of(mark: Mark) -> str:
    """Return the worker of a run."""
    return mark.run.partition("/")[0]


def _judge_trace(findings: Findings, group: str, trace: Trace, windows: Windows) -> Mapping[str, Counter[int]]:
    ends: defaultdict[str, Counter[int]] = defaultdict(Counter)
    repeated: set[tuple[str, int]] = set()
    for violation in find_violations(trace.scan(), ends):
        mark, other = violation.mark, violation.other
        text = f"{group}: {violation.text} (run {mark.run} at {mark.at:.3f}, beside run {other.run} at {other.at:.3f})"
        if violation.kind == "repeated":
            repeated.add((mark.key, mark.number))
        elif violation.kind == "overlapping":
            findings.note(windows.overlaps(worker_of(mark), mark.at) or "overlapping", text)
        else:
            findings.note(violation.kind, text)
    for (key, number), runs in _ends_of(trace, repeated).items():
        # Each run but the last should have been the only one.
        for first, second in pairwise(runs):
            text = (
                f"{group}: {key!r} number {number} ended at {first.at:.3f} ({first.run}) and {second.at:.3f} "
                f"({second.run})"
            )
            # The ledger is only entered once, whatever happens.
            explained = None if group == "ledger" else windows.repeats(worker_of(first), first.at)
            if explained is None and group == CLAIMED:
                explained = windows.repeats_claimed(worker_of(first), first.at)
            findings.note(explained or "repeated", text)
    return ends


def _ends_of(trace: Trace, messages: set[tuple[str, int]]) -> Mapping[tuple[str, int], list[Mark]]:
    found: defaultdict[tuple[str, int], list[Mark]] = defaultdict(list)
    if messages:
        for mark in trace.scan():
            if mark.kind == "end" and (mark.key, mark.number) in messages:
                found[mark.key, mark.number].append(mark)
    return found


def _judge_ledger(findings: Findings, entries: Iterable[tuple[str, int]]) -> Mapping[str, Counter[int]]:
    entered: defaultdict[str, Counter[int]] = defaultdict(Counter)
    latest: dict[str, int] = {}
    for key, number in entries:
        entered[key][number] += 1
        if entered[key][number] > 1:
            findings.note("entered twice", f"{key!r} number {number} has {entered[key][number]} rows")
        elif number < latest.get(key, number):
            findings.note("entered out of order", f"{key!r} number {number} was entered after number {latest[key]}")
        latest[key] = max(number, latest.get(key, number))
    return entered


def _judge_notes(
    findings: Findings,
    notes: Iterable[Note],
    ended: Mapping[str, Mapping[str, Counter[int]]],
    buried: Container[tuple[str, str, int]],
) -> None:
    confirmed: set[tuple[str, str, int]] = set()
    unknown: set[tuple[str, str, int]] = set()
    for note in notes:
        message = (note.group, note.key, note.number)
        if note.outcome == "confirmed":
            if message in confirmed:
                findings.counts["published twice"] += 1
                continue
            confirmed.add(message)
            if message not in buried and not ended[note.group].get(note.key, Counter())[note.number]:
                findings.note("lost", f"{note.group}: {note.key!r} number {note.number}, confirmed at {note.at:.3f}")
        elif note.outcome == "unknown":
            unknown.add(message)
        else:
            findings.counts["refused"] += 1
    unknown -= confirmed
    findings.counts["published"] = len(confirmed)
    findings.counts["ended"] = sum(len(numbers) for group in ended.values() for numbers in group.values())
    findings.counts["unknown"] = len(unknown)
    findings.counts["unknown that ran"] = sum(
        1 for group, key, number in unknown if ended[group].get(key, Counter())[number]
    )
