"""`make demo`: options, progress, the table, and the exit status."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from celery_sharding.testing import ServerNotReady
from demo.brokers import BadBroker, open_broker
from demo.events import BadEvents, Event, plan_sends, read_events
from demo.race import Outcome, Side, prepare_environment, run_race

EVENTS = Path(__file__).resolve().parents[2] / "data" / "events.csv"


@click.command(help="Replay real events through celery-sharding and through stock Celery, with a worker killed midway.")
@click.option("--events", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=EVENTS)
@click.option("--key", default="account", show_default=True, help="Column that picks the shard.")
@click.option("--id", "name", default="event", show_default=True, help="Column with the event's id.")
@click.option("--limit", type=click.IntRange(min=0), default=2000, show_default=True, help="First events; 0 for all.")
def main(path: Path, key: str, name: str, limit: int) -> None:
    console = Console(highlight=False)
    # So that a SIGTERM too leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        events = read_events(path, key=key, name=name, limit=limit)
        outcomes = run_demo(events, console)
    except (BadEvents, BadBroker, ServerNotReady) as error:
        raise click.ClickException(str(error)) from error
    show_table(outcomes, len(events), console)
    sharded = outcomes[0]
    if not sharded.verdict.is_clean or sharded.unrun:
        console.print("[bold red]celery-sharding did not keep its word[/]", sharded.verdict.example or "")
        sys.exit(1)


def run_demo(events: list[Event], console: Console) -> list[Outcome]:
    """Run both sides, sharded first, and leave nothing behind."""
    sends = plan_sends(events)
    keys = len({event.account for event in events})
    console.print(f"{len(events):,} events of {keys:,} keys, each sent one to three times: {len(sends):,} messages")
    folder = Path(tempfile.mkdtemp(prefix="sharding-demo-"))
    run_name = f"demo-{uuid.uuid4().hex[:8]}"
    try:
        with open_broker(folder, name=run_name, say=console.print) as broker:
            console.print(f"broker: {broker.title}")
            prepare_environment(folder, broker=broker, name=run_name)
            sides = [
                Side("sharded", "celery-sharding", "apply_event", run_name),
                Side("stock", "stock Celery", "apply_event_anywhere", f"{run_name}-stock"),
            ]
            columns = [TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            with Progress(*columns, console=console) as progress:
                outcomes = []
                for side in sides:
                    bar = progress.add_task(side.title, total=len(sends))
                    outcome = run_race(
                        side,
                        sends,
                        broker=broker,
                        folder=folder,
                        say=progress.console.print,
                        advance=lambda done, bar=bar: progress.update(bar, completed=done),
                    )
                    outcomes.append(outcome)
                return outcomes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show_table(outcomes: list[Outcome], events: int, console: Console) -> None:
    """Print the verdict on both sides."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in ("", "events", "lost", "out of order", "duplicated effects", "events/s"):
        table.add_column(title, justify="right" if title else "left")
    for outcome in outcomes:
        verdict = outcome.verdict
        faults = [verdict.lost, verdict.out_of_order, verdict.duplicated]
        marked = [f"[{'red' if fault else 'green'}]{fault:,}[/]" for fault in faults]
        table.add_row(outcome.side.title, f"{events:,}", *marked, f"{verdict.events / outcome.seconds:,.0f}")
    console.print(table)
    for outcome in outcomes:
        if outcome.unrun:
            console.print(f"{outcome.side.title}: {outcome.unrun:,} messages were not run; it was given up")
        if outcome.verdict.example:
            console.print(f"{outcome.side.title}: {outcome.verdict.example}")


if __name__ == "__main__":
    main()
