"""`shards flower`: Flower with the page of shards."""

from __future__ import annotations

import click

from celery_sharding.cli.exits import WrongUsage, explained
from celery_sharding.cli.groups import find_sharding, open_backing


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
    with explained():
        sharding = find_sharding(ctx)
        open_backing(sharding)  # says what is wrong with the broker's URL
        try:
            from flower.command import flower as start_flower

            from celery_sharding.flower import install
        except ModuleNotFoundError as exc:
            raise WrongUsage(f"{exc.name} is missing; install it with: pip install 'celery-sharding[flower]'") from exc
        install(ctx.obj.app)
    ctx.invoke(start_flower, tornado_argv=options)
