"""`shards status`: a snapshot of the groups, once or until Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage
from celery_sharding.cli.groups import NOT_DECLARED, choose_groups, connected, find_on_rabbitmq
from celery_sharding.cli.output import emit, format_duration, format_time, parse_duration
from celery_sharding.cli.rows import describe_group, read_columns
from celery_sharding.monitoring.health import check_health
from celery_sharding.monitoring.management import open_management
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.snapshot_json import to_json
from celery_sharding.monitoring.status import Snapshot
from celery_sharding.monitoring.watcher import View, Watcher

_EVERY_SECONDS = 1.0
_FIRST_SECONDS = 10.0
_CLEAR_SCREEN = "\033[H\033[2J\033[3J"


@click.command()
@click.argument("group", required=False)
@click.option("--watch", is_flag=True, help="Show it every second, until Ctrl-C.")
@click.option("--check", is_flag=True, help="Exit with 1 if anything is wrong, with the reasons on stderr.")
@click.option("--max-lag", metavar="DURATION", help="With --check: a larger lag is wrong, too; such as 90, 5m, 1h.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, for programs.")
@click.option("--jsonl", "as_jsonl", is_flag=True, help="Print a line of JSON for each shard.")
@click.option("--columns", metavar="A,B,…", help="The columns of the table, as the JSON names them.")
@click.pass_context
def status(
    ctx: click.Context,
    group: str | None,
    watch: bool,
    check: bool,
    max_lag: str | None,
    as_json: bool,
    as_jsonl: bool,
    columns: str | None,
) -> None:
    """Show every shard of GROUP, or of all groups: its owner, how many messages wait, and for how long.

    A lag with "~" is estimated, because the shard has no owner, or its owner has not seen the messages yet; "?" means
    unknown. CLEAR is the time until nothing waits, at the present rates; "-" if the backlog does not shrink. SINCE is
    how long the owner has had the shard; without an owner, the time since the last one reported. Exits with 1 if a
    group was never declared.

    With --check it also exits with 1 if a shard with work is unowned, no worker is there at all, a shard is stuck or
    missing, messages wait for a claim store that does not answer, a lag is above --max-lag, or a switch is stalled. A
    paused shard is never wrong.

    \b
    Examples:
      celery -A shop shards status
      celery -A shop shards status orders --watch
      celery -A shop shards status --check --max-lag 90s
      celery -A shop shards status --columns index,state,lag_seconds,queue
      celery -A shop shards status --json | jq '.groups[].shards[] | select(.state == "unowned")'
      celery -A shop shards status --jsonl | jq 'select(.lag_seconds > 60)'
    """
    if watch and (check or max_lag is not None):
        raise WrongUsage("--check shows the groups once; leave out --watch")
    if as_json and as_jsonl:
        raise WrongUsage("--json and --jsonl exclude each other")
    if max_lag is not None and not check:
        raise WrongUsage("--max-lag belongs to --check; add --check")
    max_lag_seconds = None if max_lag is None else parse_duration(max_lag)
    printer = _Printer(ctx, "json" if as_json else "jsonl" if as_jsonl else "text", read_columns(columns))
    sharding = find_on_rabbitmq(ctx, "status")
    chosen = [each.name for each in choose_groups(sharding, group)]
    with connected(sharding) as connection:
        management = open_management(sharding.settings, connection)
        if not watch:
            snapshot = read_snapshot(connection, chosen, management=management)
    if watch:
        _watch(Watcher(sharding.connect, chosen, every_seconds=_EVERY_SECONDS, management=management), printer)
        return
    printer.show(snapshot)
    if snapshot.management_error:
        click.echo(f"{snapshot.management_error}; this is what plain AMQP knows", err=True)
    undeclared = [each.name for each in snapshot.groups if not each.declared]
    if undeclared and printer.form != "text":
        click.echo(f"{', '.join(undeclared)}: {NOT_DECLARED}", err=True)
    problems: tuple[str, ...] = ()
    if check:
        health = check_health(snapshot, max_lag_seconds=max_lag_seconds)
        problems = health.problems
        for line in problems:
            click.echo(line, err=True)
        for line in health.warnings:
            click.echo(f"warning: {line}", err=True)
    if undeclared or problems:
        ctx.exit(Unhealthy.exit_code)


class _Printer:
    """Prints snapshots in one `form`: "text", "json" (a line each) or "jsonl" (a line for each shard)."""

    def __init__(self, ctx: click.Context, form: str, columns: tuple[str, ...]) -> None:
        self.form = form
        self.is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it is closed
        self._ctx = ctx
        self._columns = columns

    def show(self, snapshot: Snapshot, *, heading: str = "") -> None:
        if self.form == "text":
            self._ctx.obj.echo("\n".join(self._lines(snapshot, heading)))
        elif self.form == "json":
            emit(self._ctx, to_json(snapshot))
        else:
            found = to_json(snapshot)
            for group in found["groups"]:
                for row in group["earlier"] + group["shards"]:
                    emit(self._ctx, {"at": found["at"], "group": group["name"], **row})
        sys.stdout.flush()

    def _lines(self, snapshot: Snapshot, heading: str) -> list[str]:
        width = shutil.get_terminal_size((120, 24)).columns if self.is_terminal else None
        lines = [heading] if heading else []
        for number, each in enumerate(snapshot.groups):
            lines += [""] if number else []
            lines += describe_group(each, self._columns, now=snapshot.taken_at, width=width)
        return lines


def _watch(watcher: Watcher, printer: _Printer) -> None:
    """Print the groups every second, until Ctrl-C. If the broker is lost, say so and wait for it."""
    # A lost connection is printed here, with the age of the data.
    logging.getLogger("celery_sharding.monitoring.watcher").setLevel(logging.CRITICAL)
    watcher.start()
    try:
        shown, view = watcher.view, watcher.wait_newer(watcher.view, timeout_seconds=_FIRST_SECONDS)
        while True:
            if view is not shown or view.why_stale(time.time()):
                _show(view, printer)
            shown, view = view, watcher.wait_newer(view, timeout_seconds=_EVERY_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # pressed twice
            watcher.stop()


def _show(view: View, printer: _Printer) -> None:
    snapshot, now = view.snapshot, time.time()
    lost = why = view.why_stale(now)
    if why:
        age = "" if snapshot is None else f"; the data is {format_duration(now - snapshot.taken_at)} old"
        lost = f"not up to date: {why}{age}"
    if printer.form == "text" and printer.is_terminal:
        sys.stdout.write(_CLEAR_SCREEN)
        heading = time.strftime("%H:%M:%S  ", time.localtime(now)) + (lost or "Ctrl-C ends")
        printer.show(snapshot or Snapshot(now, ()), heading=heading)
    elif lost:
        click.echo(lost, err=True)
    elif snapshot is not None:
        printer.show(snapshot, heading=format_time(now))
