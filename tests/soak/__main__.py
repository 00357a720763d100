"""`make soak`: which faults, how long, on which broker."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from celery_sharding.testing import RabbitCluster, RedisNode, ServerMissing, ServerNotReady
from soak.plan import NET_TICK_SECONDS, NODE_KINDS, Kind, plan_faults
from soak.run import run_soak
from soak.servers import Servers
from soak.verdict import is_clean

_PUBLISHERS = 2
_CLUSTER = "cluster"
_NEEDED = {True: "BROKER=cluster", False: "a single broker of our own"}


@click.command(help="Run workers and publishers under random faults, and judge what ran. Exits with 1 on a violation.")
@click.option("--minutes", type=click.FloatRange(min=0.1), default=10.0, show_default=True)
@click.option("--seed", type=int, default=None, help="Of the faults. Default: a random one, which is printed.")
@click.option("--workers", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--rate", type=click.FloatRange(min=1), default=110.0, show_default=True, help="Messages a second.")
@click.option("--faults", default="", help=f"Kinds, with commas between; default: all of {', '.join(Kind)}.")
@click.option("--keep", is_flag=True, help="Keep the folder with traces and logs in any case.")
@click.option("--broker", envvar="SHARDING_TEST_BROKER_URL", required=True, help="URL of RabbitMQ, or `cluster`.")
@click.option("--restart", envvar="SHARDING_TEST_BROKER_RESTART", default=None, help="Command that restarts it.")
@click.option("--node", envvar="SHARDING_TEST_BROKER_FOLDER", default=None, help="Folder of the node, if it is ours.")
def main(
    minutes: float,
    seed: int | None,
    workers: int,
    rate: float,
    faults: str,
    keep: bool,
    broker: str,
    restart: str | None,
    node: str | None,
) -> None:
    # So that a SIGTERM too removes workers and queues.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    seed = random.randrange(1_000_000) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="sharding-soak-"))
    clean = False
    try:
        with ExitStack() as started:
            redis = started.enter_context(RedisNode(keeps_data=True))
            if broker == _CLUSTER:
                say("starting a cluster of three nodes")
                cluster = started.enter_context(RabbitCluster(net_tick_seconds=NET_TICK_SECONDS))
                servers = Servers(cluster.url, redis, cluster=cluster)
            else:
                servers = Servers(broker, redis, restart, Path(node) if node else None)
            kinds = choose_kinds(faults, servers)
            where = "" if node else f" BROKER={broker}"
            chosen = "" if kinds == servers.kinds else f" FAULTS={','.join(kinds)}"
            say(f"seed {seed}; to replay: make soak SEED={seed} MINUTES={minutes:g} WORKERS={workers}{where}{chosen}")
            clean = is_clean(
                run_soak(
                    servers,
                    plan_faults(seed, minutes, workers=workers, publishers=_PUBLISHERS, kinds=kinds),
                    minutes=minutes,
                    workers=workers,
                    publishers=_PUBLISHERS,
                    rate=rate,
                    folder=folder,
                    say=say,
                )
            )
    except (ServerMissing, ServerNotReady) as error:
        raise click.ClickException(str(error)) from error
    finally:
        if clean and not keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            say(f"traces, notes and logs are in {folder}")
    if not clean:
        sys.exit(1)


def choose_kinds(faults: str, servers: Servers) -> tuple[Kind, ...]:
    """Return the kinds that were asked for and can happen on these servers."""
    names = [name.strip() for name in faults.split(",") if name.strip()]
    for name in names:
        if name not in list(Kind):
            raise click.BadParameter(f"{name!r} is none of {', '.join(Kind)}", param_hint="--faults")
        if Kind(name) not in servers.kinds:
            raise click.BadParameter(f"{name!r} needs {_NEEDED[Kind(name) in NODE_KINDS]}", param_hint="--faults")
    return tuple(kind for kind in servers.kinds if not names or kind in names)


def say(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
