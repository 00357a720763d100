"""`shards doctor`: what is wrong, or may go wrong, with groups, their broker, and the app; and what to do about it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import click

from celery_sharding.cli.doctor_app import examine_app
from celery_sharding.cli.exits import Unhealthy, explained
from celery_sharding.cli.groups import choose_groups, connected, find_sharding
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
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def doctor(ctx: click.Context, group: str | None, as_json: bool) -> None:
    """Look for what is wrong, or may go wrong, with GROUP or all groups, their broker, and this app. Changes nothing.

    Every finding comes with its fix; what is as it should be is said, too. With the setting sharding_management_url it
    sees more: bindings, policies, alarms, replicas. Exits with 1 if there is an error.

    \b
    Examples:
      celery -A shop shards doctor
      celery -A shop shards doctor orders --json | jq '.groups[].findings[] | select(.severity == "error")'
    """
    with explained():
        sharding = find_sharding(ctx)
        chosen = choose_groups(sharding, group)
        found: dict[str, list[Finding]] = {}
        queues: list[int] = []
        with connected(sharding, needed_by="doctor") as connection:
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
    if as_json:
        ctx.obj.echo(json.dumps(_to_json(found, of_app)))
    else:
        for heading, findings in [*found.items(), ("the app", of_app)]:
            ctx.obj.echo(f"{heading}:")
            for line in _describe(findings):
                ctx.obj.echo(f"  {printable(line)}")
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
        yield Finding(
            "ok", "channels", f"{needed} of the {allowed} that a connection may have serve all of these shards"
        )


def _describe(findings: Iterable[Finding]) -> list[str]:
    lines = []
    for each in findings:
        lines.append(f"{each.severity:<8} {each.check}: {each.text}")
        if each.fix:
            lines.append(f"{'':<8} → {each.fix}")
    return lines


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
