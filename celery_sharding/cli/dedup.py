"""`celery -A app shards dedup …`: look at a claim, forget it, delete what has expired.

A key is written as in logs and errors: after the name of its task, or its scope, as in `shop.pay:evt-1`.
"""

from __future__ import annotations

from typing import Any

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage, ask, check_can_ask, yes_option
from celery_sharding.cli.output import emit, format_duration, json_option
from celery_sharding.dedup.claims import DONE, PARKED, RUNNING, ClaimStore, Shown
from celery_sharding.dedup.mark import dedup_options
from celery_sharding.dedup.owners import is_provably_gone
from celery_sharding.dedup.purging import purge_expired
from celery_sharding.dedup.stores import store_for
from celery_sharding.errors import DamagedRecord


@click.group()
def dedup() -> None:
    """Look at the claims of deduplicated tasks, and forget them."""


@dedup.command()
@click.argument("key")
@json_option
@click.pass_context
def show(ctx: click.Context, key: str, as_json: bool) -> None:
    """Show the claim of KEY: its state, its holder and lease, and its result's size. Changes nothing.

    \b
    Examples:
      celery -A shop shards dedup show shop.pay:evt-1
      celery -A shop shards dedup show shop.pay:evt-1 --json | jq .state
    """
    shown = _find(ctx, _open_store(ctx), key)
    emit(ctx, _to_json(shown) if as_json else _describe(shown))


@dedup.command()
@click.argument("key")
@yes_option
@click.option("--force", is_flag=True, help="Also if it is damaged, or held: then its commit is refused.")
@click.pass_context
def forget(ctx: click.Context, key: str, yes: bool, force: bool) -> None:
    """Forget the claim of KEY, so that the next call with it runs again.

    A row that `claim.transaction` wrote into your own database stays, and ends every run of KEY until it expires;
    delete it there, too, if the effects are to be written again.

    \b
    Examples:
      celery -A shop shards dedup forget shop.pay:evt-1
      celery -A shop shards dedup forget shop.pay:evt-1 --force --yes
    """
    check_can_ask(yes=yes)
    store = _open_store(ctx)
    try:
        shown = _find(ctx, store, key)
        lines = _describe(shown)
        if not force:
            _refuse_held(shown)
    except DamagedRecord as exc:
        if not force:
            raise
        lines = [str(exc)]
    for line in lines:
        click.echo(line, err=True)
    ask(f"Forget {key}?", yes=yes)
    if not store.forget(key, force=force):
        _refuse_held(_find(ctx, store, key))
    ctx.obj.echo(f"{key}: forgotten; the next call with it runs")


@dedup.command()
@click.pass_context
def purge(ctx: click.Context) -> None:
    """Delete the claims that have expired, where the store does not do so by itself: in databases and files.

    \b
    Example:
      celery -A shop shards dedup purge
    """
    _open_store(ctx)
    count = purge_expired(ctx.obj.app)
    ctx.obj.echo(f"{count} expired claims deleted")


def _open_store(ctx: click.Context) -> ClaimStore:
    store = store_for(ctx.obj.app)
    if store.is_of_one_process:
        raise WrongUsage("this app keeps its claims in the memory of its processes, which no command can see")
    return store


def _find(ctx: click.Context, store: ClaimStore, key: str) -> Shown:
    shown = store.show(key)
    if shown is not None:
        return shown
    app = ctx.obj.app
    app.loader.import_default_modules()
    scopes = sorted(_scopes(app))
    advice = ""
    if scopes and key.rpartition(":")[0] not in scopes:
        advice = f". Put the task or scope before the key: {', '.join(f'{scope}:{key}' for scope in scopes)}"
    raise Unhealthy(f"nothing is known of {key}{advice}")


def _scopes(app: Any) -> set[str]:
    found = {name: dedup_options(task) for name, task in app.tasks.items()}
    return {options.scope or name for name, options in found.items() if options is not None}


def _refuse_held(shown: Shown) -> None:
    left = shown.lease_left_seconds
    if left is not None and left > 0:
        raise Unhealthy(
            f"{shown.key} is {shown.state}, for {format_duration(left)} more at least; --force forgets it all the "
            "same, and refuses the commit of its run"
        )


def _describe(shown: Shown) -> list[str]:
    owner, left, facts = shown.owner, shown.lease_left_seconds, []
    if owner is not None:
        facts.append(("holder", f"task {owner.task_id}, process {owner.pid} on {owner.host}"))
        if shown.state == RUNNING and is_provably_gone(owner):
            facts.append(("", "that process is gone; the next call takes over"))
        if shown.state == PARKED:
            facts.append(("", "it waits for its retry"))
    elif shown.state == DONE and shown.task_id:
        facts.append(("done by", f"task {shown.task_id}"))
    if left is not None:
        facts.append(("lease", f"{format_duration(left)} left" if left > 0 else f"lapsed {format_duration(-left)} ago"))
    facts.append(("attempts", str(shown.attempts)))
    if shown.result_bytes is not None:
        facts.append(("result", f"{shown.result_bytes} bytes"))
    facts += [("fencing", str(shown.fencing)), ("kept for", format_duration(shown.expires_in_seconds))]
    return [f"{shown.key}: {shown.state}", *(f"  {name:<10}{text}" for name, text in facts)]


def _to_json(shown: Shown) -> dict[str, Any]:
    owner = shown.owner
    return {
        "key": shown.key,
        "state": shown.state,
        "task_id": shown.task_id,
        "holder": None if owner is None else {"host": owner.host, "pid": owner.pid, "task_id": owner.task_id},
        "lease_left_seconds": shown.lease_left_seconds,
        "attempts": shown.attempts,
        "result_bytes": shown.result_bytes,
        "fencing": shown.fencing,
        "expires_in_seconds": shown.expires_in_seconds,
    }
