"""`shards exporter`: metrics of the groups for Prometheus, on a port of its own."""

from __future__ import annotations

import signal
import threading

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage, explained
from celery_sharding.cli.groups import check_has_logs, choose_groups, find_sharding
from celery_sharding.monitoring.management import open_management
from celery_sharding.monitoring.watcher import Watcher

# Prometheus asks every 15 s or less often.
_EVERY_SECONDS = 3.0


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=9808, show_default=True, type=click.IntRange(0, 65_535), help="0: any that is free.")
@click.pass_context
def exporter(ctx: click.Context, host: str, port: int) -> None:
    """Serve metrics of all groups on /metrics for Prometheus, until it is told to end. Needs the extra `metrics`.

    One is enough for an app. It asks nobody for a password, so it listens on this host only unless told otherwise.
    /healthz answers as long as it runs; that the broker is out of reach is said by celery_sharding_up 0.

    \b
    Examples:
      celery -A shop shards exporter
      celery -A shop shards exporter --host 0.0.0.0 --port 9808
    """
    with explained():
        sharding = find_sharding(ctx)
        chosen = choose_groups(sharding, None)
        check_has_logs(sharding, needed_by="exporter")
        try:
            from celery_sharding.metrics import ShardCollector
            from celery_sharding.metrics.serving import MetricsServer
        except ModuleNotFoundError as exc:
            raise WrongUsage(f"{exc.name} is missing; install it with: pip install 'celery-sharding[metrics]'") from exc
        management = open_management(sharding.settings, sharding.connect())
        names = [group.name for group in chosen]
        watcher = Watcher(sharding.connect, names, every_seconds=_EVERY_SECONDS, management=management)
        try:
            server = MetricsServer(ShardCollector(watcher), host=host, port=port)
        except (OSError, UnicodeError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise Unhealthy(f"cannot listen on {host}, port {port}: {reason}") from exc
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    watcher.start()
    click.echo(f"metrics of {', '.join(names)} on http://{_in_url(server.host)}:{server.port}/metrics", err=True)
    ended.wait()
    server.close()
    watcher.stop()


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
