"""One run: start the workers, publish, kill one in the middle, start it again, wait, judge."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery_sharding.testing import WorkerNode
from demo.brokers import Broker
from demo.effects import Verdict, make_tables, read_verdict
from demo.events import Event

POOL_PROCESSES = 4
_AWAY_SECONDS = 1.0
_STALL_SECONDS = 45.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two apps of `demo.shop`, by the names of the app, its task and its queue."""

    app: str
    title: str
    task: str
    queue: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `unrun` messages were not run when nothing had happened for long, and it was given up."""

    side: Side
    verdict: Verdict
    seconds: float
    sent: int
    unrun: int


def run_race(
    side: Side,
    sends: list[tuple[Event, int]],
    *,
    broker: Broker,
    folder: Path,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> Outcome:
    """Run one side to its end and judge it.

    Args:
        side: Whose turn it is.
        sends: What is published, in order: event and number of the copy.
        broker: Where.
        folder: Of the databases and logs.
        say: Told what happens.
        advance: Told how many messages have been run so far.
    """
    make_tables(folder / f"{side.app}.db")
    with _workers(side, broker, folder) as workers:
        say(f"{side.title}: {len(workers)} worker{'s' * (len(workers) > 1)} × {POOL_PROCESSES} processes ready")
        began = time.monotonic()
        publisher = _Publisher(side, sends)
        publisher.start()
        ended, unrun = _watch(workers, publisher, folder / f"{side.app}.runs", len(sends), broker, say, advance)
        publisher.join()
        for worker in workers:
            worker.stop()
    names = list(dict.fromkeys(event.name for event, _ in sends))
    verdict = read_verdict(folder / f"{side.app}.db", names)
    return Outcome(side, verdict, ended - began, len(sends), unrun)


@contextmanager
def _workers(side: Side, broker: Broker, folder: Path) -> Iterator[list[WorkerNode]]:
    options = ["-Q", side.queue, "-c", str(POOL_PROCESSES)]
    if broker.is_embedded:
        options += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    names = ["worker1"] if broker.is_embedded else ["worker1", "worker2"]
    workers = [
        WorkerNode(
            f"demo.shop:{side.app}", f"{name}-{side.app}@localhost", options, env={"DEMO_APP": side.app}, folder=folder
        )
        for name in names
    ]
    try:
        for worker in workers:
            worker.start(wait_seconds=0)
        for worker in workers:
            worker.wait_for(" ready.")
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def _watch(
    workers: list[WorkerNode],
    publisher: _Publisher,
    log: Path,
    total: int,
    broker: Broker,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> tuple[float, int]:
    """Follow the run; in the middle, kill a worker and start it again. Return when it ended, and what was not run."""
    runs: dict[str, str] = {}
    victim: WorkerNode | None = None
    restart_at = 0.0
    changed = time.monotonic()
    offset = 0
    while len(runs) < total:
        time.sleep(_LOOK_SECONDS)
        if publisher.error is not None:
            raise publisher.error
        lines, offset = _read_lines(log, offset)
        now = time.monotonic()
        if lines:
            changed = now
            # Message → worker. A message that was run again counts once.
            runs.update(line.rsplit(" ", 1) for line in lines)
            advance(len(runs))
        elif now - changed > _STALL_SECONDS:
            break
        if victim is None and len(runs) >= total / 2:
            victim = _find_busiest(workers, runs)
            _strike(victim, broker, len(runs), total, say)
            changed = time.monotonic()
            restart_at = changed + _AWAY_SECONDS
        if victim is not None and restart_at and now >= restart_at:
            restart_at = 0.0
            victim.start(wait_seconds=0)
            say(f"  {_short(victim)} started again")
    if victim is not None and restart_at:
        victim.start()
        say(f"  {_short(victim)} started again, after the end")
    return changed, total - len(runs)


def _find_busiest(workers: list[WorkerNode], runs: dict[str, str]) -> WorkerNode:
    counts = Counter(runs.values())
    return max(workers, key=lambda worker: counts[worker.name])


def _strike(victim: WorkerNode, broker: Broker, done: int, total: int, say: Callable[[str], None]) -> None:
    if broker.is_embedded:
        victim.stop()
        say(f"  {_short(victim)} stopped (warm) after {done:,} of {total:,} messages")
    else:
        victim.kill()
        say(f"  {_short(victim)} [red]killed[/] (SIGKILL, with its pool) after {done:,} of {total:,} messages")


def _short(worker: WorkerNode) -> str:
    return worker.name.partition("@")[0]


def _read_lines(log: Path, offset: int) -> tuple[list[str], int]:
    """Return the whole lines of `log` from `offset` on, and where they end."""
    if not log.exists():
        return [], offset
    with log.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode().splitlines(), offset + len(whole)


class _Publisher(threading.Thread):
    """Publishes in order, beside the workers. `error` is what stopped it."""

    def __init__(self, side: Side, sends: list[tuple[Event, int]]) -> None:
        super().__init__(name="publisher", daemon=True)
        self._side = side
        self._sends = sends
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            task = _load_task(self._side)
            for event, copy in self._sends:
                task.delay(event.account, event.name, event.position, copy)
        except Exception as error:  # Told to the main thread, whatever it is.
            self.error = error


def _load_task(side: Side) -> Any:
    # Only now: the module reads where broker and databases are from the environment.
    from demo import shop

    return getattr(shop, side.task)


def prepare_environment(folder: Path, *, broker: Broker, name: str) -> None:
    """Tell `demo.shop`, here and in the workers, where broker and databases are."""
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    os.environ.update(DEMO_FOLDER=str(folder), DEMO_BROKER_URL=broker.url, DEMO_NAME=name, PYTHONPATH=path)
