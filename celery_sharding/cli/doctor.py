"""`shards doctor`: what is wrong, or may go wrong, with groups, their broker, and the app; and what to do about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import click

from celery_sharding.cli.doctor_app import examine_app
from celery_sharding.cli.exits import Unhealthy
from celery_sharding.cli.groups import choose_groups, connected, find_on_rabbitmq
from celery_sharding.cli.output import emit, json_option
from celery_sharding.layout.channels import allowed_channels, describe_shortage, needed_channels
from celery_sharding.layout.manifest import load
from celery_sharding.monitoring.doctor import Finding, Patient, examine
from celery_sharding.monitoring.management import open_management
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.texts import printable
from celery_sharding.timestamps import format_moment
from celery_sharding.topology import Names


@click.command()
@click.argument("group", required=False)
@json_option
@click.pass_context
def doctor(ctx: click.Context, group: str | None, as_json: bool) -> None:
    """Look for what is wrong, or may go wrong, with GROUP or all groups, their broker, and this app. Changes nothing.

    Every finding comes with its fix; checks that passed are listed, too. With the setting sharding_management_url it
    sees more: bindings, policies, alarms, replicas. Exits with 1 if there is an error.

    \b
    Examples:
      celery -A shop shards doctor
      celery -A shop shards doctor orders --json | jq '.groups[].findings[] | select(.severity == "error")'
    """
    sharding = find_on_rabbitmq(ctx, "doctor")
    chosen = choose_groups(sharding, group)
    found: dict[str, list[Finding]] = {}
    queues: list[int] = []
    with connected(sharding) as connection:
        api = open_management(sharding.settings, connection)
        statuses = read_snapshot(connection, [each.name for each in chosen]).groups
        for each, status in zip(chosen, statuses, strict=True):
            layout = load(connection, Names(each.name))
            patient = Patient(connection, sharding.connect, each, layout, status)
            timeout_seconds = sharding.settings.consumer_timeout_seconds
            found[each.name] = list(examine(patient, api, consumer_timeout_seconds=timeout_seconds))
            queues.append(max(layout.shards, each.shards))
        of_app = [*_check_channels(connection, queues)]
    of_app += examine_app(sharding)
    emit(ctx, _to_json(found, of_app) if as_json else _lines({**found, "the app": of_app}))
    if any(each.severity == "error" for findings in [*found.values(), of_app] for each in findings):
        ctx.exit(Unhealthy.exit_code)


def _check_channels(connection: Any, queues: list[int]) -> Iterator[Finding]:
    """Say whether one worker may consume all these groups; `queues` of each."""
    needed, allowed = needed_channels(queues), allowed_channels(connection)
    if allowed is None:
        return
    if needed > allowed:
        yield Finding("error", "channels", *describe_shortage(needed, allowed))
    else:
        text = f"all of these shards need {needed} of the {allowed} channels that a connection may have"
        yield Finding("ok", "channels", text)


def _lines(found: dict[str, list[Finding]]) -> Iterator[str]:
    for heading, findings in found.items():
        yield f"{heading}:"
        for each in findings:
            yield f"  {each.severity:<8} {each.check}: {printable(each.text)}"
            if each.fix:
                yield f"  {'':<8} → {printable(each.fix)}"


def _to_json(found: dict[str, list[Finding]], of_app: list[Finding]) -> dict[str, Any]:
    return {
        "schema": 1,
        "at": format_moment(time.time()),
        "groups": [
            {"name": name, "findings": [dataclasses.asdict(each) for each in findings]}
            for name, findings in found.items()
        ],
        "app": [dataclasses.asdict(each) for each in of_app],
    }
