"""One soak, from its first fault to its verdict.

    start ──all are at work──▶ publish, with faults ──the time is up──▶ drain, without faults
        ──all ended, or nothing ends any more──▶ judge

The faults run in threads of their own, one each, and come to their end by themselves. Those of one target run one after
the other, in whatever time a busy machine needs for the first. A worker that ends though no fault ended it is a
finding, and is started again.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from celery_sharding.testing.processes import tail, wait_until
from soak.faults import STOP_SECONDS, FaultFailed, inject
from soak.field import Field
from soak.ledger import create_ledger, read_entries
from soak.plan import GROUPS, Fault
from soak.servers import Servers
from soak.verdict import EXPLAINED, TOLD, VIOLATIONS, Findings, Incident, Letter, Pace, judge, measure_pace

_LOOK_SECONDS = 0.2
_BEGIN_SECONDS = 60.0
_PROGRESS_SECONDS = 10.0
# Longer than a drained queue is kept, since what came to it too late runs when it is removed.
_STALL_SECONDS = 120.0
_FAULT_SECONDS = 180.0
# Longer than workers take to look at their groups, and to carry on what they find.
_WHOLE_SECONDS = 60.0


def run_soak(
    servers: Servers,
    plan: Sequence[Fault],
    *,
    minutes: float,
    workers: int,
    publishers: int,
    rate: float,
    folder: Path,
    say: Callable[[str], None],
) -> Findings:
    """Run one soak and return what was found.

    Args:
        rate: Messages a second of all publishers.
        folder: For traces, notes, ledger and logs; empty.
        say: Told what happens, a line each time.
    """
    create_ledger(folder)
    with Field(servers, folder) as field:
        for number in range(1, workers + 1):
            field.add_worker(f"w{number}")
        # On a busy machine to start takes as long as a short soak, whose faults would hit nobody.
        field.wait_for_workers(timeout_seconds=_BEGIN_SECONDS)
        field.start_publishers(publishers, rate=rate, seconds=minutes * 60)
        wait_until(lambda: field.count_confirmed() > 0, timeout_seconds=_BEGIN_SECONDS)
        soak = _Soak(field, say)
        try:
            soak.publish(plan, time.time() + minutes * 60)
            soak.drain()
        finally:
            soak.end_faults()
        findings = soak.end()
        pace = measure_pace(field.traces, field.read_notes())
    say(describe(findings, pace))
    return findings


def describe(findings: Findings, pace: Pace) -> str:
    """Return the verdict in lines."""
    counts = findings.counts
    a_minute = 60 * counts["ended"] / max(pace.seconds, 1.0)
    lines = [
        f"{counts['published']:,} published, {counts['ended']:,} ended within {pace.seconds:.0f} s",
        f"{a_minute:,.0f} ended a minute, faults and all; {pace.slowest_seconds:.0f} s from confirm to end at most",
        ", ".join(f"{counts[name]} {name}" for name in TOLD),
        ", ".join(f"{counts[name]} {name}" for name in VIOLATIONS),
        "explained: " + ", ".join(f"{counts[name]} {name}" for name in EXPLAINED),
    ]
    lines += [f"first {name}: {findings.examples[name]}" for name in (*VIOLATIONS, *EXPLAINED) if counts[name]]
    return "\n".join(lines)


class _Soak:
    def __init__(self, field: Field, say: Callable[[str], None]) -> None:
        self._field = field
        self._say = say
        self._began = self._progressed = time.time()
        self._over = threading.Event()
        self._changed = threading.Lock()
        self._findings = Findings()
        self._incidents: list[Incident] = []
        self._threads: list[threading.Thread] = []
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def publish(self, plan: Sequence[Fault], until: float) -> None:
        """Let the faults happen while the publishers publish, and return when all of that is over."""
        waiting = list(plan)
        while time.time() < until or any(publisher.poll() is None for publisher in self._field.publishers):
            self._look()
            while waiting and self._began + waiting[0].at_seconds <= time.time():
                self._start(waiting.pop(0))
        for thread in self._threads:
            thread.join(_FAULT_SECONDS)
            if thread.is_alive():
                self._note("faults that failed", f"{thread.name} does not come to its end")
        for number, publisher in enumerate(self._field.publishers, start=1):
            if publisher.returncode:
                log = tail(self._field.folder / f"p{number}.log", lines=3)
                self._note("faults that failed", f"p{number} ended with status {publisher.returncode}: {log}")

    def end_faults(self) -> None:
        """Let the faults that still last be over, and wait for them: what they start again has to be ended, too."""
        self._over.set()
        for thread in self._threads:
            thread.join(_FAULT_SECONDS)

    def drain(self) -> None:
        """Return when all is run that was published, or nothing has ended for long."""
        wanted = len({(note.group, note.number) for note in self._field.read_notes() if note.outcome == "confirmed"})
        before, changed = -1, time.time()
        while time.time() - changed < _STALL_SECONDS:
            self._look()
            ended = self._count_ended()
            if ended != before:
                before, changed = ended, time.time()
            if ended >= wanted and not self._judge().counts["lost"]:
                return

    def end(self) -> Findings:
        """Stop the workers and return what was found in all."""
        for group in GROUPS:
            self._expect_whole(group)
        for party in self._field.workers.values():
            if not party.should_run:
                continue
            party.should_run = False
            try:
                status = party.node.stop(timeout_seconds=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            if status != 0:
                self._note("workers that did not stop", f"{party.name}: status {status}, see {party.node.log.name}")
        judged = self._judge(self._field.take_dead_letters())
        judged.counts.update(self._findings.counts)
        judged.examples.update(self._findings.examples)
        return judged

    def _expect_whole(self, group: str) -> None:
        """Note it if the workers do not bring a group to where it is live in its last segment only."""
        deadline = time.time() + _WHOLE_SECONDS
        while trouble := self._field.find_trouble(group):
            if time.time() >= deadline:
                self._note("groups not whole", f"{group}: {trouble}")
                return
            self._look()

    def _start(self, fault: Fault) -> None:
        self._tell(str(fault))
        turn = self._turns[fault.victim]
        thread = threading.Thread(target=self._inject, args=(fault, turn), name=str(fault), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _inject(self, fault: Fault, turn: threading.Lock) -> None:
        try:
            with turn:
                incident = inject(self._field, fault, self._over)
        except Exception as error:  # Whatever it is, it is told at the end, and the soak goes on.
            self._note("faults that failed", f"{fault}: {error!r}")
            if not isinstance(error, FaultFailed):
                raise
        else:
            with self._changed:
                self._incidents.append(incident)

    def _look(self) -> None:
        """Wait a moment, start workers again that ended by themselves, and tell the progress now and then."""
        time.sleep(_LOOK_SECONDS)
        for party in list(self._field.workers.values()):
            if party.should_run and not party.node.is_running and party.should_run:
                last = tail(party.node.log, lines=1)
                self._note("workers that ended by themselves", f"{party.name} at {time.time():.3f}: {last}")
                party.node.start(wait_seconds=0)
        if time.time() - self._progressed >= _PROGRESS_SECONDS:
            self._progressed = time.time()
            self._tell(f"{self._field.count_confirmed():,} published, {self._count_ended():,} ended")

    def _count_ended(self) -> int:
        return sum(trace.count() for trace in self._field.traces.values())

    def _judge(self, letters: Sequence[Letter] = ()) -> Findings:
        with self._changed:
            incidents = list(self._incidents)
        entries, notes = read_entries(self._field.folder), self._field.read_notes()
        return judge(self._field.traces, entries, notes, incidents, letters)

    def _note(self, name: str, example: str) -> None:
        with self._changed:
            self._findings.note(name, example)
        self._tell(f"!! {name}: {example}")

    def _tell(self, text: str) -> None:
        self._say(f"{time.time() - self._began:7.1f} s  {text}")
