"""`shards flower` and `shards exporter`: the groups shown in Flower, and to Prometheus on a port of its own."""

from __future__ import annotations

import signal
import threading

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage
from celery_sharding.cli.groups import choose_groups, find_on_rabbitmq, find_sharding, open_backing
from celery_sharding.monitoring.management import open_management
from celery_sharding.monitoring.watcher import Watcher

# Prometheus scrapes every 15 s or less often.
_EVERY_SECONDS = 3.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def flower(ctx: click.Context, options: tuple[str, ...]) -> None:
    """Start Flower with a page of the shards, their metrics and an API. Needs the extra `flower`.

    Takes all of Flower's own OPTIONS, its environment variables and its flowerconfig.py. Pausing, resuming and
    replaying from the page needs a login, as Flower's API does.

    \b
    Examples:
      celery -A shop shards flower
      celery -A shop shards flower --port=5556 --basic-auth=ann:secret --url-prefix=flower
      celery -A shop shards flower --basic-auth=ann:secret --read-only
    """
    open_backing(find_sharding(ctx))  # says what is wrong with the broker's URL
    try:
        from flower.command import flower as start_flower

        from celery_sharding.flower import install
    except ModuleNotFoundError as exc:
        raise _missing(exc, extra="flower") from exc
    install(ctx.obj.app)
    ctx.invoke(start_flower, tornado_argv=options)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=9808, show_default=True, type=click.IntRange(0, 65_535), help="0: any free one.")
@click.pass_context
def exporter(ctx: click.Context, host: str, port: int) -> None:
    """Serve the metrics of all groups to Prometheus on /metrics, until it is stopped. Needs the extra `metrics`.

    One is enough for an app. It asks for no password, so it listens on this host only unless told otherwise. /healthz
    answers as long as it runs; when the broker is out of reach, celery_sharding_up is 0.

    \b
    Examples:
      celery -A shop shards exporter
      celery -A shop shards exporter --host 0.0.0.0 --port 9808
    """
    sharding = find_on_rabbitmq(ctx, "exporter")
    names = [group.name for group in choose_groups(sharding, None)]
    try:
        from celery_sharding.metrics import ShardCollector
        from celery_sharding.metrics.serving import MetricsServer
    except ModuleNotFoundError as exc:
        raise _missing(exc, extra="metrics") from exc
    management = open_management(sharding.settings, sharding.connect())
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
    place = f"[{server.host}]" if ":" in server.host else server.host
    click.echo(f"metrics of {', '.join(names)} on http://{place}:{server.port}/metrics", err=True)
    ended.wait()
    server.close()
    watcher.stop()


def _missing(error: ModuleNotFoundError, *, extra: str) -> WrongUsage:
    return WrongUsage(f"{error.name} is missing; install it with: pip install 'celery-sharding[{extra}]'")
