"""`make bench`: which benchmarks, how long, and the table."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import click

from benchmarks import (
    claims,
    dedup,
    gaps,
    import_time,
    memory,
    one_key,
    peers,
    publish,
    skew,
    spread,
    throughput,
    timers,
)
from benchmarks.results import Row, Setup, table
from celery_sharding.testing import ServerMissing, ServerNotReady

BENCHMARKS = {
    "publish": publish.run,
    "brief": throughput.run_brief,
    "empty": throughput.run_empty,
    "skew": skew.run,
    "one-key": one_key.run,
    "dedup": dedup.run,
    "claims": claims.run,
    "peers": peers.run,
    "gaps": gaps.run,
    "spread": spread.run,
    "timers": timers.run,
    "memory": memory.run,
    "import": import_time.run,
}


@click.command(help="Measure celery-sharding against stock Celery, in turns, and print ratios. Default: everything.")
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--quick", is_flag=True, help="A third of the messages, three rounds.")
@click.option("--rounds", type=click.IntRange(min=1), default=None, help="Rounds of each; 7, or 3 when quick.")
@click.option("--broker", envvar="SHARDING_TEST_BROKER_URL", required=True, help="URL of RabbitMQ.")
@click.option("--redis", envvar="SHARDING_TEST_REDIS_URL", required=True, help="URL of Redis, for the claims.")
def main(names: tuple[str, ...], quick: bool, rounds: int | None, broker: str, redis: str) -> None:
    # So that a SIGTERM too removes workers and queues.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sharding-bench-") as folder:
        setup = Setup(broker, redis, Path(folder), rounds or (3 if quick else 7), quick, say)
        for name in names or BENCHMARKS:
            try:
                rows += BENCHMARKS[name](setup)
            except (ServerMissing, ServerNotReady) as error:
                raise click.ClickException(str(error)) from error
    cores = os.cpu_count()
    if rows:
        click.echo(f"{cores} cores, {setup.rounds} rounds, medians; ratio = sharded / stock\n\n{table(rows)}")


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
